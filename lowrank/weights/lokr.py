"""LoKr: `W + scale * kron(W1, W2)`, each factor full or of low rank (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

With `in = m n` and `out = l k`, W1 is `[m, l]` and W2 is `[n, k]`: entry `(i n + i', j k + j')` of the update is
`W1[i, j] W2[i', j']`. The rank of the update is the product of the factors' ranks. A factor of low rank is `A @ B`,
where A is `[m, r]` or `[n, r]`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, Weight, at_least_float32, dot_to_float32, form, frozen, materialize, trainable
from lowrank.weights import stacked_layers


@form
class LoKr(Weight):
    """`base` `[..., in, out]`, `w1` `[..., m, l]` or `a1`, `b1`, `w2` `[..., n, k]` or `a2`, `b2`, `scale` `[...]`."""

    base: Any = frozen(axes=KERNEL)
    w1: jax.Array | None = trainable(axes=KERNEL, default=None)
    a1: jax.Array | None = trainable(axes=("in", None), default=None)
    b1: jax.Array | None = trainable(axes=(None, "out"), default=None)
    w2: jax.Array | None = trainable(axes=KERNEL, default=None)
    a2: jax.Array | None = trainable(axes=("in", None), default=None)
    b2: jax.Array | None = trainable(axes=(None, "out"), default=None)
    scale: jax.Array = frozen()

    def factors(self) -> tuple[list[Any], list[Any]]:
        """`([w1] or [a1, b1], [w2] or [a2, b2])`."""
        first = [self.a1, self.b1] if self.w1 is None else [self.w1]
        return first, [self.a2, self.b2] if self.w2 is None else [self.w2]

    def materialize(self) -> jax.Array:
        """`W + scale * kron(W1, W2)`, summed in float32 and rounded once to the base's dtype."""
        base, factors = materialize(self.base), []
        for parts in self.factors():
            parts = [at_least_float32(part) for part in parts]
            factors.append(jnp.matmul(*parts, precision="highest") if len(parts) == 2 else parts[0])
        update = jnp.einsum("...ml,...nk->...mnlk", *factors, precision="highest").reshape(base.shape)
        return (at_least_float32(base) + update * self.scale[..., None, None]).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W` plus the update: x is reshaped to matrices `[m, n]`, with W1 on their left and W2 on their right.

        In half precision, the factors of the update and each of its products are rounded.
        """
        first, second = ([part.astype(x.dtype) for part in parts] for parts in self.factors())
        x_mn = x.reshape(*x.shape[:-1], first[0].shape[0], second[0].shape[0])
        left, right = "mpl" if len(first) == 2 else "ml", "nqk" if len(second) == 2 else "nk"
        pairs = [a + b for letters in (left, right) for a, b in itertools.pairwise(letters)]
        update = jnp.einsum(f"...mn,{','.join(pairs)}->...lk", x_mn, *first, *second, optimize="optimal")
        return dot_to_float32(x, self.base) + at_least_float32(update.reshape(*x.shape[:-1], -1)) * self.scale


class FactorSizes(NamedTuple):
    """The sizes of the factors `[m, l]` and `[n, k]` of a kernel `[m n, l k]`, and which of them are full matrices."""

    m: int
    n: int
    l: int  # noqa: E741
    k: int
    whole1: bool
    whole2: bool


def split_dimension(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two integers: `factor` first if it divides, otherwise the divisors nearest to the root.

    In the second case the smaller divisor comes first and is at most `factor`; -1 sets no bound.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and (factor == -1 or d <= factor))
    return small, size // small


def factor_sizes(n_in: int, n_out: int, rank: int, factor: int, both: bool) -> FactorSizes:
    """The sizes by LyCORIS's rule: a factor is of low rank if the rank is below half its larger side.

    W1 is of low rank only if `both` is set too.
    """
    (m, n), (l, k) = split_dimension(n_in, factor), split_dimension(n_out, factor)  # noqa: E741
    return FactorSizes(m, n, l, k, whole1=not (both and 2 * rank < max(m, l)), whole2=2 * rank >= max(n, k))


def attach(
    key: jax.Array, w: Any, *, ranks: Sequence[int], alphas: Sequence[float], factor: int = -1, both: bool = False
) -> LoKr:
    """A LoKr on `w` `[..., in, out]` that starts as the identity: W1, or its B, is zero; the rest is Kaiming uniform.

    There is one rank and one alpha per layer of the stack (one if `w` is not stacked); a rank of 0 leaves its layer
    unadapted. Raises UserError for ranks that would decompose a factor in some layers of the stack only.
    """
    stack, live, rank = w.shape[:-2], stacked_layers.rank_mask(ranks, w.shape[:-2]), max(ranks)
    n_in, n_out = w.shape[-2:]
    shapes = {factor_sizes(n_in, n_out, r, factor, both) for r in ranks if r}
    if len(shapes) > 1:
        raise UserError(
            f"ranks {min(r for r in ranks if r)} to {rank} in one stack would make LoKr decompose only some of the "
            "layers: give all layers of the stack one rank"
        )
    (s,) = shapes
    key_1, key_a, key_b = jax.random.split(key, 3)
    of_a, of_b, of_w = live[..., None, :], live[..., :, None], jnp.any(live, axis=-1)[..., None, None]
    if s.whole1:
        first = {"w1": jnp.zeros((*stack, s.m, s.l), jnp.float32)}
    else:
        a1 = stacked_layers.kaiming_uniform(key_1, (*stack, s.m, rank), s.m) * of_a
        first = {"a1": a1, "b1": jnp.zeros((*stack, rank, s.l), jnp.float32)}
    if s.whole2:
        second = {"w2": stacked_layers.kaiming_uniform(key_a, (*stack, s.n, s.k), s.n) * of_w}
    else:
        a2 = stacked_layers.kaiming_uniform(key_a, (*stack, s.n, rank), s.n) * of_a
        second = {"a2": a2, "b2": stacked_layers.kaiming_uniform(key_b, (*stack, rank, s.k), rank) * of_b}
    return LoKr(base=w, **first, **second, scale=stacked_layers.lora_scales(ranks, alphas, stack))
