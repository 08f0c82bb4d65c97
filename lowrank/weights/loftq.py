"""LoftQ: codes Q and LoRA factors A, B that approximate W together (Li et al. 2023, arXiv:2310.08659, algorithm 1).

Starting from `A B = 0`, two steps alternate: `Q = quantize(W - s A B)`, then `s A B` becomes the best approximation of
`W - Q` of rank r.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank.weights.lora import LoRA
from lowrank.weights.quantized.base import Quantized


def attach(
    w: jax.Array, *, rank: int, scale: float, steps: int, dropout: float, quantize: Callable[[jax.Array], Quantized]
) -> LoRA:
    """A LoRA on the codes of `w` `[..., in, out]`, after `steps` alternations.

    The factors are each divided by the root of `scale` (alpha / r), so that the scaled update is the approximation.
    """

    def alternate(kernel: jax.Array) -> tuple[Quantized, jax.Array, jax.Array]:
        wide, update = kernel.astype(jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
        for _ in range(steps):
            codes = quantize(wide - update)
            u, s, v = jnp.linalg.svd(wide - codes.materialize(), full_matrices=False)
            root = jnp.sqrt(s[:rank] / scale)
            a, b = u[:, :rank] * root[None, :], root[:, None] * v[:rank]
            update = scale * jnp.matmul(a, b, precision="highest")
        return dataclasses.replace(codes, dtype_name=w.dtype.name), a, b

    over_stack = alternate
    for _ in w.shape[:-2]:  # one layer at a time
        over_stack = (lambda inner: lambda stack: jax.lax.map(inner, stack))(over_stack)
    codes, a, b = over_stack(w)
    return LoRA(base=codes, a=a, b=b, scale=jnp.full(w.shape[:-2], scale, jnp.float32), dropout=dropout)
