"""The grouped low-rank product, its gradient, and the checks of its arguments on the host."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.kernels.dispatch import Operation
from lowrank.kernels.grouped_lora import gpu, plain, tpu

_OPERATION = Operation(
    "grouped_lora",
    xla={"tpu": plain.multiply_on_tpu, "default": plain.multiply},
    pallas_tpu=tpu.multiply,
    pallas_gpu=gpu.multiply,
)
# The adapters for which the TPU body, as compiled, moves fewer bytes than plain JAX: so many ranks in all, of which no
# adapter has more than these.
SHOWN_RANKS, SHOWN_RANK = 4096, 64


def grouped_lora(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array, implementation: str = "auto"
) -> jax.Array:
    """`scale[id] * (x @ a[id].T) @ b[id]` `[T, out]` of each row, in the dtype of `x`.

    A value of one adapter that is not finite reaches the rows and the gradient of that adapter only. The gradient is
    that of the form in plain JAX. `check_ids` refuses ids on the host; in a compiled program, a row whose id is out of
    range is zero. Raises UserError for a dtype or a rank that the body for GPUs, where it is named, cannot take.
    """
    if implementation == "pallas_gpu":
        gpu.check(x.dtype, a.shape[1])
    unshown = a.shape[0] * a.shape[1] < SHOWN_RANKS or a.shape[1] > SHOWN_RANK
    return _product("xla" if implementation == "auto" and unshown else implementation, x, a, b, scale, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation: str, *arrays: jax.Array) -> jax.Array:
    return _OPERATION(*arrays, implementation=implementation)


def _backward(implementation: str, arrays: tuple[jax.Array, ...], g: jax.Array) -> tuple[Any, ...]:
    """The gradients; those of an adapter with a value that is not finite, and of its rows, are NaN."""
    x, *adapters, ids = arrays
    whole = functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(w), axis=tuple(range(1, w.ndim))) for w in adapters)
    )
    found = plain.sort_keys(ids, len(whole))
    healthy = jnp.append(whole, True)[found]
    select = lambda mask, w, other: jnp.where(mask.reshape(-1, *[1] * (w.ndim - 1)), w, other)  # noqa: E731
    forward = functools.partial(_multiply, jnp.where(healthy, ids, -1))
    dx, *gradients = jax.vjp(forward, x, *(select(whole, w, 0) for w in adapters))[1](select(healthy, g, 0))
    return select(healthy, dx, jnp.nan), *(select(whole, d, jnp.nan) for d in gradients), None


def _multiply(ids: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    return plain.multiply(x, a, b, scale, ids)


_product.defvjp(lambda implementation, *arrays: (_product(implementation, *arrays), arrays), _backward)


def stack_adapters(
    adapters: Sequence[tuple[jax.Array, jax.Array, float]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(a, b, scale)` of adapters `(a [in, r], b [r, out], scale)` whose ranks may differ.

    Raises UserError where there is none, or where their kernels differ in shape.
    """
    shapes = {(a.shape[0], b.shape[1]) for a, b, _ in adapters}
    if len(shapes) != 1:
        raise UserError(f"adapters of one batch must be of one kernel, not of the shapes {sorted(shapes)}: split them")
    ranks = max(b.shape[0] for _, b, _ in adapters)
    pad = lambda w: jnp.pad(w, ((0, ranks - len(w)), (0, 0)))  # noqa: E731
    a, b = (jnp.stack([pad(w) for w in ws]) for ws in ([a.T for a, _, _ in adapters], [b for _, b, _ in adapters]))
    return a, b, jnp.asarray([scale for _, _, scale in adapters], jnp.float32)


def check_ids(ids: np.ndarray, adapters: int) -> None:
    """Raises UserError unless each id is that of an adapter, or -1 for none."""
    wrong = sorted(set(ids[(ids < -1) | (ids >= adapters)].tolist()))
    if wrong:
        allowed = f"-1 for none or 0 to {adapters - 1}" if adapters else "-1 for none"
        raise UserError(
            f"the adapter ids {wrong[:5]} are not loaded: an id is {allowed}; load them, or drop their rows"
        )
