"""LoRA: `W + scale * A @ B` (Hu et al. 2021, arXiv:2106.09685).

The scale may be rsLoRA's (Kalajdzievski 2023, arXiv:2312.03732), and the initial factors PiSSA's (Meng et al. 2024,
arXiv:2404.02948) or OLoRA's (Büyükakyüz 2024, arXiv:2406.01775).

Kernels are `[in, out]`, so A is `[in, r]` and B is `[r, out]`, the transposes of the paper's; the inputs of an
embedding `[vocab, width]` are tokens. A stack of layers has a layer axis first. The layers of a stack may have
different ranks: smaller ranks are padded to the largest with zero columns of A and zero rows of B. The gradients of the
padding are zero, so it stays zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import (
    KERNEL,
    PRODUCT,
    Weight,
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    grouped,
    grouped_to_float32,
    is_weight,
    materialize,
    name_product,
    static,
    take,
    trainable,
)
from lowrank.kernels.lora_matmul.dispatch import lora_matmul
from lowrank.weights import stacked_layers


@form
class LoRA(Weight):
    """`base` `[..., in, out]`, `a` `[..., in, r]`, `b` `[..., r, out]`, `scale` `[...]`, `key` `[...]` or None."""

    base: Any = frozen(axes=KERNEL)
    a: jax.Array = trainable(axes=("in", None))
    b: jax.Array = trainable(axes=(None, "out"))
    scale: jax.Array = frozen()  # alpha / r or alpha / sqrt(r), one per layer; it is a leaf so that checkpoints hold it
    key: jax.Array | None = frozen(default=None)  # the dropout key, bound for one training step
    dropout: float = static(default=0.0)

    def delta(self) -> jax.Array:
        """The update `scale * A @ B`, `[..., in, out]` in float32 or wider."""
        product = jnp.matmul(at_least_float32(self.a), at_least_float32(self.b), precision="highest")
        return product * self.scale[..., None, None]

    def materialize(self) -> jax.Array:
        """`W + scale * A @ B`, summed in float32 and rounded once to the base's dtype."""
        base = materialize(self.base)
        return (at_least_float32(base) + self.delta()).astype(base.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`dot_to_float32`, rounded once."""
        return self._multiply(x, x.dtype) if self._is_fused() else super().dot(x)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W + scale * drop(x) @ A @ B` without forming `A @ B`.

        In half precision, A, B, `scale * drop(x) @ A` and the update are rounded, and the product with W is not.
        """
        if self._is_fused():
            return self._multiply(x, jnp.promote_types(x.dtype, jnp.float32))
        return dot_to_float32(x, self.base) + at_least_float32(self.low_rank_update(x))

    def _is_fused(self) -> bool:
        """Whether one operation multiplies by W, A and B: W is an array, and no dropout or other form changes A B."""
        return type(self) is LoRA and not is_weight(self.base) and (self.key is None or not self.dropout)

    def _multiply(self, x: jax.Array, dtype: Any) -> jax.Array:
        return lora_matmul(x, self.base, self.a, self.b, self.scale, dtype=dtype, name=PRODUCT)

    def low_rank_update(self, x: jax.Array) -> jax.Array:
        """`scale * drop(x) @ A @ B` for `x: [..., in]`."""
        t = dot_to_float32(self._drop(x), self.a) * self.scale
        return project_up(name_product(t.astype(x.dtype)), self.b)

    def take(self, ids: jax.Array) -> jax.Array:
        """The rows `ids` of `W + scale * A @ B`, an embedding `[vocab, width]`; as in PEFT, nothing is dropped out."""
        if type(self) is not LoRA:
            return super().take(ids)
        rows = take(self.base, ids)
        low = at_least_float32(jnp.take(self.a, ids, axis=0)) * self.scale
        update = jnp.matmul(low, at_least_float32(self.b), precision="highest")
        return (at_least_float32(rows) + update).astype(rows.dtype)

    def dot_transposed_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W.T + scale * x @ B.T @ A.T`, the logits of a head that is this embedding, without forming `A @ B`."""
        if type(self) is not LoRA:
            return super().dot_transposed_to_float32(x)
        low = (dot_to_float32(x, self.b, 1) * self.scale).astype(x.dtype)
        return dot_to_float32(x, self.base, 1) + dot_to_float32(low, self.a, 1)

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x W_g + scale_g * drop(x) A_g B_g` for rows sorted by group; `A B` is not formed for any group.

        All groups use the first group's dropout key, which is safe because each row belongs to one group.
        """
        key = self.key if self.key is None else self.key[0]
        a, b = self.factors()
        low = grouped(dataclasses.replace(self, key=key)._drop(x), a, sizes)
        update = grouped(low, b * self.scale[:, None, None], sizes)
        return grouped_to_float32(x, self.base, sizes) + at_least_float32(update)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`(A, B)`, whose product times the scale is the update."""
        return self.a, self.b

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.key is None or not self.dropout:
            return x
        keep = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0)


@jax.custom_vjp
def project_up(t: jax.Array, b: jax.Array) -> jax.Array:
    """`t @ b` for `t: [..., r]` and `b: [r, out]`, in the dtype of `t`: from the rank to the outputs.

    The gradient of `b` is computed as `t.T @ g`. Autodiff would compute `(g.T @ t).T`, for which XLA on CPUs copies the
    wide `g` transposed: adapters of rank 8 then add 70 % to the time of a gated MLP, instead of 15 %.
    """
    return dot(t, b)


def _widen_fwd(t: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project_up(t, b), (t, b)


def _widen_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    t, b = saved
    rows = tuple(range(t.ndim - 1))
    wide_type = jnp.result_type(t, b)
    db = jax.lax.dot_general(t, g, ((rows, rows), ((), ())), preferred_element_type=wide_type)
    return dot(g, b.T), db.astype(b.dtype)


project_up.defvjp(_widen_fwd, _widen_bwd)


def attach(
    key: jax.Array, w: Any, *, ranks: Sequence[int], alphas: Sequence[float], rslora: bool, dropout: float, init: str
) -> LoRA:
    """A LoRA on `w` `[..., in, out]` with one rank and one alpha per layer of the stack (one if `w` is not stacked).

    All experts `[layers, experts, in, out]` of a layer have the layer's rank and alpha. A rank of 0 leaves its layer
    unadapted. Raises UserError for an unknown `init`, and for one that needs a plain kernel if `w` is a form.
    """
    if init not in INITS:
        raise unknown("LoRA init", init, INITS)
    stack, (n_in, n_out), rank = w.shape[:-2], w.shape[-2:], max(ranks)
    scale = jnp.array([_scale(r, a, rslora) for r, a in zip(ranks, alphas, strict=True)], jnp.float32)
    lora = LoRA(
        base=w,
        a=jnp.zeros((*stack, n_in, rank), jnp.float32),
        b=jnp.zeros((*stack, rank, n_out), jnp.float32),
        scale=_over_experts(scale, stack, 0),
        dropout=dropout,
    )
    lora = INITS[init](key, lora, np.maximum(ranks, 1))
    live = jnp.arange(rank)[None, :] < jnp.array(ranks)[:, None]
    live = _over_experts(live, (*stack, rank), 1)
    lora = dataclasses.replace(lora, a=lora.a * live[..., None, :], b=lora.b * live[..., :, None])
    # The initial update is subtracted from the base, so this follows the masking of the padding.
    return _residual(lora) if init in RESIDUAL else lora


def attach_equal_ranks(key: jax.Array, w: Any, *, rank: int, alpha: float, dropout: float = 0.0) -> LoRA:
    """`attach` with one rank and one alpha for all layers, the scale alpha / rank and a Kaiming uniform A."""
    layers = w.shape[0] if len(w.shape) > 2 else 1
    ranks, alphas = (rank,) * layers, (alpha,) * layers
    return attach(key, w, ranks=ranks, alphas=alphas, rslora=False, dropout=dropout, init="kaiming")


def _over_experts(values: jax.Array, shape: tuple[int, ...], trailing: int) -> jax.Array:
    """`values` `[layers, ...]`, with `trailing` axes after the first, broadcast to `shape`.

    The shape may have an axis of experts after that of the layers.
    """
    if len(shape) == trailing:
        return values.reshape(shape)
    between = (1,) * (len(shape) - trailing - 1)
    return jnp.broadcast_to(values.reshape(shape[0], *between, *values.shape[1:]), shape)


def _scale(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / max(rank, 1) ** (0.5 if rslora else 1)


def _gaussian(key: jax.Array, lora: LoRA, ranks: np.ndarray) -> LoRA:
    """A from N(0, 1 / r^2), with each layer's own rank r, as in PEFT."""
    return dataclasses.replace(lora, a=jax.random.normal(key, lora.a.shape) / _per_layer(ranks, lora.a.shape))


def _kaiming(key: jax.Array, lora: LoRA, ranks: np.ndarray) -> LoRA:
    del ranks
    return dataclasses.replace(lora, a=stacked_layers.kaiming_uniform(key, lora.a.shape, lora.a.shape[-2]))


def _zero_a(key: jax.Array, lora: LoRA, ranks: np.ndarray) -> LoRA:
    """B from N(0, 1 / r), with each layer's own rank r, and A at zero (Hayou et al. 2024, arXiv:2406.08447)."""
    return dataclasses.replace(lora, b=jax.random.normal(key, lora.b.shape) * _per_layer(ranks**-0.5, lora.b.shape))


def _per_layer(values: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """One value per layer, float32, broadcast to the `shape` `[..., m, n]` of a factor."""
    spread = _over_experts(jnp.asarray(values, jnp.float32), shape[:-2], 0)
    return jnp.broadcast_to(spread[..., None, None], shape)


def _pissa(key: jax.Array, lora: LoRA, ranks: np.ndarray) -> LoRA:
    """The leading singular triplets of W, divided evenly: `A = U sqrt(S / scale)` and `B = sqrt(S / scale) V`."""
    del key, ranks
    u, s, v = jnp.linalg.svd(require_plain_kernel("PiSSA", lora.base), full_matrices=False)
    rank = lora.a.shape[-1]
    root = jnp.sqrt(s[..., :rank] / lora.scale[..., None])
    return dataclasses.replace(lora, a=u[..., :, :rank] * root[..., None, :], b=root[..., :, None] * v[..., :rank, :])


def _olora(key: jax.Array, lora: LoRA, ranks: np.ndarray) -> LoRA:
    """For the paper's kernel `W = Q R` `[out, in]`: `B = Q[:, :r]` and `A = R[:r]`, each transposed to our layout."""
    del key, ranks
    q, r = stacked_layers.apply_per_matrix(
        jnp.linalg.qr, jnp.swapaxes(require_plain_kernel("OLoRA", lora.base), -1, -2)
    )
    rank = lora.a.shape[-1]
    return dataclasses.replace(lora, a=jnp.swapaxes(r[..., :rank, :], -1, -2), b=jnp.swapaxes(q[..., :, :rank], -1, -2))


def require_plain_kernel(what: str, base: Any) -> jax.Array:
    """The kernel `base` in float32, for the decomposition called `what`; a form raises UserError."""
    if is_weight(base):
        raise UserError(
            f"{what} decomposes a plain kernel, not a {type(base).__name__}: use it on a base that is not quantized, "
            "and before other methods"
        )
    return base.astype(jnp.float32)


def _residual(lora: LoRA) -> LoRA:
    return dataclasses.replace(lora, base=(lora.base.astype(jnp.float32) - lora.delta()).astype(lora.base.dtype))


INITS: dict[str, Callable[..., LoRA]] = {  # (key, LoRA of zeros, rank of each layer) -> LoRA
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "zero_a": _zero_a,
    "pissa": _pissa,
    "olora": _olora,
}
RESIDUAL = ("pissa", "olora")  # the initial update is a part of the base, and the base keeps the rest
