"""VeRA as a method: the shared matrices are leaves at the root, and `bind` gives each weight its part of them."""

from typing import Any

import jax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import SHARED, Method
from lowrank.methods.options import own_meaning
from lowrank.weights import vera as form


@own_meaning("rank")  # the length of a vector, not the rank of an update
def vera(rank: int = 256, target: str = r".*attn/(q|v|qkv)/kernel", d_initial: float = 0.1, seed: int = 0) -> Method:
    """VeRA: two vectors per weight around random matrices that all weights share (Kopiczko et al., arXiv:2310.11454).

    See `lowrank.weights.vera`. The shared `a` and `b` are drawn from `seed` alone and stay frozen. As in the paper, the
    rank is the length of a learned vector and may be above min(in, out) of a kernel.

    Differs from the paper: kernels of unequal shapes share one pair of matrices too, of which each uses its first rows
    and columns, as in PEFT.
    """
    targets.check_positive(rank=rank)
    if not d_initial:
        raise UserError("method.d_initial must not be 0, where all gradients are 0: give a small number such as 0.1")

    def adapt(key: jax.Array, w: Any, name: str) -> form.VeRA:
        del key
        targets.check_kernel(name)
        return form.attach(w, rank, d_initial)

    def init_shared(base: PyTree, key: jax.Array) -> PyTree:
        del key
        weights = dict(tree.named_leaves(base, weight.is_weight))
        shapes = [weights[name].shape[-2:] for name in tree.match_names(target, weights, "target")]
        return form.random_projections(jax.random.key(seed), rank, *map(max, zip(*shapes, strict=True)))

    return Method(rules=((target, adapt),), init_shared=init_shared, bind=bind_vera)


def bind_vera(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
    """`params` with its part of the shared matrices in every VeRA, and without the shared leaves."""
    del batch, rng
    if SHARED not in params:
        return params
    rest = {name: child for name, child in params.items() if name != SHARED}

    def handed(w: Any) -> Any:
        return form.with_projections(w, **params[SHARED]) if isinstance(w, form.VeRA) else w

    return jax.tree.map(handed, rest, is_leaf=weight.is_weight)
