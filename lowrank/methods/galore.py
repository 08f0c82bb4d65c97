"""GaLore: every parameter is trained, and the optimizer sees the gradients of kernels in a low-rank space.

optax 0.2.8 has a `contrib.scale_by_galore`. It does not take stacked kernels, it projects the longer side where the
paper projects the shorter one, and its state holds empty arrays, which checkpoints cannot hold. So this is our own.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank.core import tree, weight
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import Hooks, Method
from lowrank.methods.options import own_meaning
from lowrank.weights import lora as form


@own_meaning("rank")  # of the optimizer's projections
def galore(
    rank: int = 64, every: int = 200, scale: float = 0.25, target: str = r"(layers|top)/.*kernel", train: str = ".*"
) -> Method:
    """GaLore: trains every parameter, and updates kernels in a low-rank space (Zhao et al. 2024, arXiv:2403.03507).

    The leaves that `train` matches are trained, and kernels that `target` matches are projected. For the gradient G
    `[in, out]` of a kernel with in <= out, `R = P^T G`. The optimizer of the run turns R `[rank, out]` into a step N,
    which is applied as `scale * P N`. P `[in, rank]` are the leading left singular vectors of G, computed every `every`
    steps. For in > out, the right ones are used: `R = G Q`. The moments are those of R. The clip acts on G, and weight
    decay on the whole kernel.

    Differs from the paper: the decay reads the kernel before its update, as in AdamW, where the authors' code reads it
    afterwards.
    """
    targets.check_positive(rank=rank, every=every, scale=scale)

    def check(key: jax.Array, w: Any, name: str) -> Any:
        del key
        form.require_plain_kernel("GaLore", w)
        targets.check_rank(name, w.shape, rank)
        return w

    return Method(
        rules=((target, check),),
        trainable=(target, train),
        hooks=Hooks(rescaling=lambda plain, steps: project_gradients(plain, rank, every, scale, target)),
    )


class ProjectedState(NamedTuple):
    """`projectors`: `[..., in, rank]` or `[..., out, rank]` for projected kernels, MaskedNode for other leaves."""

    inner: Any
    count: jax.Array  # type: ignore[assignment]  # the updates done; the name hides tuple.count
    projectors: PyTree


def project_gradients(
    plain: optax.GradientTransformation, rank: int, every: int, scale: float, target: str
) -> optax.GradientTransformation:
    """`plain` in the space that the leading singular vectors of each targeted gradient `[..., in, out]` span."""

    def down(leaves: PyTree, projectors: PyTree) -> PyTree:
        return jax.tree.map(lambda x, p: x if _masked(p) else _down(x, p), leaves, projectors)

    def init(trained: PyTree) -> ProjectedState:
        def empty(name: str, x: jax.Array) -> Any:
            if not re.fullmatch(target, name):
                return optax.MaskedNode()
            return jnp.zeros((*x.shape[:-2], min(x.shape[-2:]), rank), jnp.float32)

        projectors = tree.map_named(empty, trained)
        return ProjectedState(plain.init(down(trained, projectors)), jnp.int32(0), projectors)

    def update(gradient: PyTree, state: ProjectedState, trained: PyTree) -> tuple[PyTree, ProjectedState]:
        due = state.count % every == 0
        renewed = lambda g, p: jax.lax.cond(due, lambda: _leading(g, rank), lambda: p)  # noqa: E731
        projectors = jax.tree.map(lambda g, p: p if _masked(p) else renewed(g, p), gradient, state.projectors)
        steps, inner = plain.update(down(gradient, projectors), state.inner, down(trained, projectors))
        updates = jax.tree.map(
            lambda g, n, p: n if _masked(p) else scale * _up(n, p, g.shape), gradient, steps, projectors
        )
        return updates, ProjectedState(inner, state.count + 1, projectors)

    return optax.GradientTransformation(init, update)


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _wide(shape: tuple[int, ...]) -> bool:
    return shape[-2] <= shape[-1]


def _leading(gradient: jax.Array, rank: int) -> jax.Array:
    """The leading singular vectors of the shorter side: `[..., min(in, out), rank]`."""
    u, _, v = jnp.linalg.svd(weight.at_least_float32(gradient), full_matrices=False)
    return u[..., :, :rank] if _wide(gradient.shape) else jnp.swapaxes(v[..., :rank, :], -1, -2)


def _down(x: jax.Array, p: jax.Array) -> jax.Array:
    return jnp.swapaxes(p, -1, -2) @ x if _wide(x.shape) else x @ p


def _up(step: jax.Array, p: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return p @ step if _wide(shape) else step @ jnp.swapaxes(p, -1, -2)
