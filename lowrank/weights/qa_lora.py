"""QA-LoRA: an update that is equal for all inputs of a quantization group, so that the codes' zeros can absorb it.

A has one row per group: `y = x W + s * sum_{i in group} x_i A B`, with `W = (code - zero) * scale`. With
`zero' = zero - s * A B / scale` the merged weight has the same codes (Xu et al. 2023, arXiv:2309.14717, section 3.3).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError
from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    is_weight,
    materialize,
    name_product,
    static,
    trainable,
)
from lowrank.weights.quantized.uniform import Uniform


@form
class QALoRA(Weight):
    """`base` with one zero per group and output, `a` `[..., groups, r]`, `b` `[..., r, out]` and `scale` `[...]`."""

    base: Any = frozen(axes=KERNEL)
    a: jax.Array = trainable(axes=("in", None))
    b: jax.Array = trainable(axes=(None, "out"))
    scale: jax.Array = frozen()
    block: int = static()

    def delta(self) -> jax.Array:
        """The update of every row of each group, `[..., groups, out]` in float32 or wider."""
        product = jnp.matmul(at_least_float32(self.a), at_least_float32(self.b), precision="highest")
        return product * self.scale[..., None, None]

    def materialize(self) -> jax.Array:
        """The base plus the update of each row's group, in the base's dtype."""
        base = materialize(self.base)
        rows = jnp.repeat(self.delta(), self.block, axis=-2)[..., : base.shape[-2], :]
        return (at_least_float32(base) + rows).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W + scale * (sums of x over the groups) @ A @ B`.

        In half precision, the sums, A, B, `scale * sums @ A` and the update are rounded.
        """
        missing = self.a.shape[-2] * self.block - x.shape[-1]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        sums = jnp.sum(at_least_float32(padded.reshape(*x.shape[:-1], -1, self.block)), axis=-1).astype(x.dtype)
        t = name_product((dot_to_float32(sums, self.a) * self.scale).astype(x.dtype))
        return dot_to_float32(x, self.base) + at_least_float32(dot(t, self.b))

    def absorbed(self) -> Uniform:
        """The base with the update added to its zeros: the codes stay the same, and nothing is rounded again."""
        zero = self.base.zero - (self.delta() / self.base.scale).astype(self.base.zero.dtype)
        return dataclasses.replace(self.base, zero=zero)


def attach(
    key: jax.Array, w: Any, *, rank: int, alpha: float, block: int, quantize: Callable[[jax.Array], Uniform]
) -> QALoRA:
    """A QA-LoRA on `w` `[..., in, out]`, which is quantized first if it is a plain kernel.

    Raises UserError for codes without zeros, and for a block that is not the codes' block.
    """
    base = w if is_weight(w) else quantize(w)
    if not isinstance(base, Uniform) or base.zero is None:
        raise UserError(
            f"QA-LoRA needs asymmetric integer codes, not {base.title}: quantize to int4 with symmetric=False"
        )
    if is_weight(w) and w.block != block:
        raise UserError(f"method.block is {block}, but the base's codes have blocks of {w.block}: give both one size")
    *stack, groups, out = base.scale.shape
    bound = (1 / groups) ** 0.5
    return QALoRA(
        base=base,
        a=jax.random.uniform(key, (*stack, groups, rank), minval=-bound, maxval=bound),
        b=jnp.zeros((*stack, rank, out), jnp.float32),
        scale=jnp.full(stack, alpha / rank, jnp.float32),
        block=block,
    )
