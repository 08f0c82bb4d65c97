"""Objectives: each gives a weighted sum of losses and the weight to divide it by, so that sums over microbatches are exact.

Shapes: B batch, T time, D width, V vocabulary, C classes, S chunks of K positions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from lowrank.errors import unknown

PyTree = Any
Batch = Mapping[str, jax.Array]
Sums = tuple[jax.Array, jax.Array]  # (sum of weighted losses, sum of weights), float32 scalars
Logits = Callable[..., jax.Array]  # (h, *consts) -> logits


def causal_lm(model: Any, params: PyTree, batch: Batch, rows: int = 0) -> Sums:
    """Weighted cross-entropy of the next token, summed over the batch.

    `batch` has `tokens, targets, positions, segments, weights` `[B,T]`. With `rows > 0` the head runs over
    chunks of about so many tokens at a time and the `[B,T,V]` logits are never stored; 0 runs it at once.
    """
    variables = {"params": params}
    h_BxTxD = model.apply(variables, batch["tokens"], batch["positions"], batch["segments"], method="features")
    logits = functools.partial(model.apply, variables, method="logits")
    if rows:
        total = chunked_nll(logits, h_BxTxD, batch["targets"], batch["weights"], rows)
    else:
        total = jnp.sum(token_nll(logits(h_BxTxD), batch["targets"]) * batch["weights"])
    return total, jnp.sum(batch["weights"])


def classification(model: Any, params: PyTree, batch: Batch, rows: int = 0) -> Sums:
    """Cross-entropy of `labels` `[B]` under the model's `[B,C]` logits, summed over the batch; `rows` is not used."""
    del rows
    logits_BxC = model.apply({"params": params}, batch["tokens"], segments=batch["segments"])
    nll_B = token_nll(logits_BxC, batch["labels"])
    return jnp.sum(nll_B), jnp.float32(nll_B.size)


OBJECTIVES: dict[str, Callable[..., Sums]] = {"causal_lm": causal_lm, "classification": classification}


def objective(name: str) -> Callable[..., Sums]:
    """The objective of that name, or UserError with the nearest one."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def token_nll(logits_xV: jax.Array, targets_x: jax.Array) -> jax.Array:
    """`-log softmax(logits)[target]` for `[..., V]` and `[...]`, in float32.

    The target's logit is picked by comparison: unlike a gather, it fuses, and it stays local when V is sharded.
    """
    logits_xV = logits_xV.astype(jnp.float32)
    hit_xV = jnp.expand_dims(targets_x, -1) == jax.lax.broadcasted_iota(jnp.int32, logits_xV.shape, logits_xV.ndim - 1)
    picked_x = jnp.sum(jnp.where(hit_xV, logits_xV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_xV, axis=-1) - picked_x


def chunked_nll(
    logits: Callable[[jax.Array], jax.Array],
    h_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    rows: int,
) -> jax.Array:
    """`sum(weights * token_nll(logits(h), targets))` with the logits of about `rows` tokens alive at a time.

    The gradient is computed in the forward pass, chunk by chunk, while a chunk's logits exist: no logits are
    stored and none are computed twice. Chunks cut T, so that a sharded B stays where it is. What `logits` closes
    over gets a gradient only if it is being differentiated: a frozen head costs no dW. Targets and weights get none.
    """
    n_batch, length = targets_BxT.shape
    size = max(1, min(length, rows // n_batch))
    chunks = jax.tree.map(lambda x: _cut(x, size), (h_BxTxD, targets_BxT, weights_BxT))
    head, consts = jax.closure_convert(logits, chunks[0][0])
    return _chunked(head, *chunks, *consts)


def _cut(x_BxT: jax.Array, size: int) -> jax.Array:
    """`[B,T,...] -> [S,B,K,...]`, the end padded with zeros: rows of weight zero."""
    n_chunks = -(-x_BxT.shape[1] // size)
    pad = n_chunks * size - x_BxT.shape[1]
    x_BxT = jnp.pad(x_BxT, [(0, 0), (0, pad)] + [(0, 0)] * (x_BxT.ndim - 2))
    return jnp.moveaxis(x_BxT.reshape(x_BxT.shape[0], n_chunks, size, *x_BxT.shape[2:]), 1, 0)


def _chunk_nll(head: Logits, h_BxKxD: jax.Array, consts: list, targets_BxK: jax.Array, weights_BxK: jax.Array) -> Any:
    return jnp.sum(token_nll(head(h_BxKxD, *consts), targets_BxK) * weights_BxK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: Logits, h_SxBxKxD: Any, targets_SxBxK: Any, weights_SxBxK: Any, *consts: Any) -> jax.Array:
    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        h, targets, weights = chunk
        return total + _chunk_nll(head, h, consts, targets, weights), None

    return jax.lax.scan(add, jnp.float32(0), (h_SxBxKxD, targets_SxBxK, weights_SxBxK))[0]


def _chunked_fwd(head: Logits, *args: CustomVJPPrimal) -> tuple[jax.Array, Any]:
    (h, targets, weights, *consts), learned = [a.value for a in args], [a.perturbed for a in args[3:]]

    def add(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        total, dconsts = carry
        h_BxKxD, targets_BxK, weights_BxK = chunk

        def nll(h: jax.Array, some: list) -> jax.Array:
            some = iter(some)
            full = [next(some) if learns else c for c, learns in zip(consts, learned, strict=True)]
            return _chunk_nll(head, h, full, targets_BxK, weights_BxK)

        picked = [c for c, learns in zip(consts, learned, strict=True) if learns]
        value, (dh_BxKxD, more) = jax.value_and_grad(nll, argnums=(0, 1))(h_BxKxD, picked)
        return (total + value, [d + m.astype(d.dtype) for d, m in zip(dconsts, more, strict=True)]), dh_BxKxD

    zeros = [jnp.zeros(c.shape, jnp.float32) for c, learns in zip(consts, learned, strict=True) if learns]
    (total, dconsts), dh = jax.lax.scan(add, (jnp.float32(0), zeros), (h, targets, weights))
    dconsts, dtypes = iter(dconsts), [c.dtype for c in consts]
    return total, (dh, [next(dconsts).astype(t) if x else None for t, x in zip(dtypes, learned, strict=True)])


def _chunked_bwd(head: Logits, residuals: Any, g: jax.Array) -> tuple:
    del head
    dh, dconsts = residuals
    scale = lambda d: d * g.astype(d.dtype)  # noqa: E731
    return scale(dh), None, None, *(None if d is None else scale(d) for d in dconsts)


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
