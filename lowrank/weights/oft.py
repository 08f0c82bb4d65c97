"""OFT: `R @ W` with R orthogonal and block-diagonal (Qiu et al. 2023, arXiv:2306.07280).

In BOFT, R is a butterfly product of such matrices, and the outputs have a learned scale (Liu et al. 2023,
arXiv:2311.06243). Every block is the Cayley transform `(I + Q) (I - Q)^-1` of a skew-symmetric Q, whose entries above
the diagonal are learned.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural
from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot_to_float32,
    form,
    frozen,
    materialize,
    static,
    trainable,
)
from lowrank.weights.gains import scale_product
from lowrank.weights.rotation import cayley, rotate


@form
class OFT(Weight):
    """`base` `[..., in, out]` and `skew` `[..., in / b, b (b - 1) / 2]`, or `[..., 1, ...]` if all blocks are equal.

    With `terms` 0, a block is the Cayley transform; otherwise this many terms of its Neumann series approximate it.
    """

    base: Any = frozen(axes=KERNEL)
    skew: jax.Array = trainable()
    terms: int = static(default=0)

    def rotation_blocks(self) -> jax.Array:
        """The factors of R, `[..., 1, in / b, b, b]`."""
        r = cayley(self.skew, self.terms)
        b = r.shape[-1]
        return jnp.broadcast_to(r, (*r.shape[:-3], self.shape[-2] // b, b, b))[..., None, :, :, :]

    def materialize(self) -> jax.Array:
        """`R @ W`, in float32 and rounded once to the base's dtype."""
        base = materialize(self.base)
        return self._rotate(at_least_float32(base)).astype(base.dtype)

    def _rotate(self, w: jax.Array) -> jax.Array:
        columns = jnp.vectorize(lambda w, r: rotate(w.T, r, True, "highest").T, signature="(i,o),(f,k,a,b)->(i,o)")
        return columns(w, self.rotation_blocks())

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`(x @ R) @ W`, with x rotated block by block; in half precision, each factor and its product are rounded."""
        return dot_to_float32(rotate(x, self.rotation_blocks()), self.base)


@form
class BOFT(OFT):
    """An OFT of f butterfly factors: `skew` `[..., f, in / b, b (b - 1) / 2]`, and `s` `[..., out]` for the outputs."""

    s: jax.Array = trainable(decay=False)

    def rotation_blocks(self) -> jax.Array:
        """The factors of R, `[..., f, in / b, b, b]`."""
        return cayley(self.skew, self.terms)

    def materialize(self) -> jax.Array:
        """`(R @ W) * s`, in float32 and rounded once to the base's dtype."""
        base = materialize(self.base)
        return (self._rotate(at_least_float32(base)) * self.s[..., None, :]).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`((x @ R) @ W) * s`; a bias is not scaled."""
        return scale_product(super().dot_to_float32(x), self.s, x.dtype)


def attach(w: Any, *, block: int, share: bool = False, terms: int = 0) -> OFT:
    """An OFT on `w` `[..., in, out]` that starts as the identity. UserError if the block does not divide the inputs."""
    return OFT(base=w, skew=_zeros(w, block, (), 1 if share else w.shape[-2] // block), terms=terms)


def attach_butterfly(w: Any, *, block: int, factors: int) -> BOFT:
    """A BOFT on `w` that starts as the identity. UserError unless `block * 2^(factors - 1)` divides the inputs."""
    wide_block = block * 2 ** (factors - 1)
    if w.shape[-2] % wide_block or (factors > 1 and block % 2):
        raise UserError(
            f"{factors} butterfly factors of block {block} need an even block and a multiple of "
            f"{plural(wide_block, 'input')}, not {w.shape[-2]}: choose another method.block or fewer factors"
        )
    s = jnp.ones((*w.shape[:-2], w.shape[-1]), jnp.float32)
    return BOFT(base=w, skew=_zeros(w, block, (factors,), w.shape[-2] // block), s=s)


def _zeros(w: Any, block: int, factors: tuple[int, ...], count: int) -> jax.Array:
    if not 2 <= block <= w.shape[-2] or w.shape[-2] % block:
        raise UserError(
            f"block {block} does not divide the {plural(w.shape[-2], 'input')}: "
            "method.block must be a divisor of at least 2"
        )
    return jnp.zeros((*w.shape[:-2], *factors, count, block * (block - 1) // 2), jnp.float32)
