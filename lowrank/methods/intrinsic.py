"""Intrinsic dimension as a method: one short vector, projected at random into every parameter."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import PyTree
from lowrank.methods.method import SHARED, Method
from lowrank.methods.projections import CHUNK, PROJECTIONS, Shape, project


def intrinsic(
    dim: int = 1000, target: str = r"(?!head/).*", projection: str = "fastfood", said: bool = False, seed: int = 0
) -> Method:
    """Intrinsic dimension: `theta = theta_0 + P z`, and only `z` `[dim]` is trained (Li et al. 2018, arXiv:1804.08838).

    P `[D, dim]` is random and drawn from `seed` at each use: `dense`, `sparse` or `fastfood` (see `projections`). D is
    the number of parameters that `target` matches. With `said`, each layer i has a learned scale,
    `theta_i + lambda_i (P z)_i`, and z is shorter by the number of scales (Aghajanyan et al. 2020, arXiv:2012.13255).
    Memory is O(D). Raises UserError for a dim that is not in 1..D, or that leaves no entry of z beside the scales.

    Differs from the paper: the columns of P have a length of 1 on average, where the paper normalizes each, and the
    blocks of Fastfood share 64 permutations. The code of the authors of SAID normalizes P within each parameter tensor,
    so that small tensors change as much as large ones, and has a scale for each tensor.
    """
    if projection not in PROJECTIONS:
        raise unknown("projection", projection, PROJECTIONS)
    if dim < 1:
        raise UserError(f"method.dim must be at least 1, not {dim}")

    def init_shared(base: PyTree, key: jax.Array) -> PyTree:
        del key
        leaves = _targets(base, target)
        total, scales = sum(math.prod(w.shape) for w in leaves.values()), _scales(leaves) if said else {}
        if dim > total:
            raise UserError(f"method.dim={dim} is larger than the {total} parameters that {target!r} matches")
        length = dim - sum(s.size for s in scales.values())
        if length < 1:
            beside = f"SAID's {plural(dim - length, 'scale')}, one per layer"
            raise UserError(f"method.dim={dim} leaves no vector beside {beside}: raise it")
        return {"intrinsic": jnp.zeros(length, jnp.float32), **({"said": scales} if said else {})}

    def bind(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
        del batch, rng
        if SHARED not in params:  # an adapter that was loaded is bound already
            return params
        shared = params[SHARED]
        params = {name: child for name, child in params.items() if name != SHARED}
        leaves = _targets(params, target)
        steps = _projected(projection, jax.random.key(seed), shared["intrinsic"], leaves)

        def moved(name: str, w: Any) -> Any:
            if name not in leaves:
                return w
            step = steps[name].reshape(w.shape)
            if said:
                scale = shared["said"][name.split("/")[0]]
                step = step * jnp.broadcast_to(scale.reshape(scale.shape + (1,) * (w.ndim - scale.ndim)), w.shape)
            return (weight.at_least_float32(w) + step).astype(w.dtype)

        return tree.map_named(moved, params, is_leaf=weight.is_weight)

    return Method(trainable=(f"{SHARED}/.*",), init_shared=init_shared, bind=bind)


def _projected(projection: str, key: jax.Array, z: jax.Array, leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """`P z` per leaf, flat. Small leaves of one size pass through one program in turn, which compiles once for all."""
    total, groups = sum(w.size for w in leaves.values()), dict[Any, list[str]]()
    for name, w in leaves.items():
        groups.setdefault(w.size if w.size <= CHUNK else name, []).append(name)
    steps: dict[str, jax.Array] = {}
    for names in groups.values():
        shape = Shape(leaves[names[0]].size, total)
        keys = jnp.stack([weight.name_key(key, name) for name in names])
        steps |= zip(names, jax.lax.map(lambda k, s=shape: project(projection, k, z, s), keys), strict=True)
    return steps


def _targets(params: PyTree, target: str) -> dict[str, Any]:
    """The plain parameters that the vector is projected into."""
    named = dict(tree.named_leaves(params, weight.is_weight))
    leaves = {name: named[name] for name in tree.match_names(target, named, "target")}
    for name, w in leaves.items():
        if weight.is_weight(w):
            raise UserError(
                f"{name} is a {type(w).__name__}, and a projection changes plain arrays only: do not target it"
            )
    return leaves


def _scales(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Ones: one per layer of a stack, and one per part of the model that is not a stack."""
    parts = {name.split("/")[0]: w for name, w in leaves.items()}
    return {part: jnp.ones(w.shape[:1] if part in tree.STACKS else (), jnp.float32) for part, w in parts.items()}
