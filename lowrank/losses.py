"""Objectives: a weighted sum of losses and the weight to divide it by, so that sums over microbatches are exact.

Shapes: B batch, T time, D width, V vocabulary, C classes, S chunks of K positions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.errors import unknown

PyTree = Any
Batch = Mapping[str, jax.Array]
Sums = tuple[jax.Array, jax.Array]  # (sum of weighted losses, sum of weights), float32 scalars


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
    """Cross-entropy of `labels` `[B]` under the model's `[B,C]` logits, summed over the rows with `valid` 1.

    `batch` has `tokens, segments` `[B,T]`, or `pooled` `[B,D]` that the head reads, and `labels, valid` `[B]`.
    The logits are few: `rows` is not used.
    """
    del rows
    if "pooled" in batch:
        logits_BxC = model.apply({"params": params}, batch["pooled"], method="labels")
    else:
        logits_BxC = model.apply({"params": params}, batch["tokens"], segments=batch["segments"])
    weights_B = batch["valid"].astype(jnp.float32)
    return jnp.sum(token_nll(logits_BxC, batch["labels"]) * weights_B), jnp.sum(weights_B)


OBJECTIVES: dict[str, Callable[..., Sums]] = {"causal_lm": causal_lm, "classification": classification}


def objective(name: str) -> Callable[..., Sums]:
    """The objective of that name, or UserError with the nearest one."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def token_nll(logits_xV: jax.Array, targets_x: jax.Array) -> jax.Array:
    """`-log softmax(logits)[target]` for `[..., V]` and `[...]`, in float32."""
    logits_xV = logits_xV.astype(jnp.float32)
    top_x1 = jax.lax.stop_gradient(jnp.max(logits_xV, axis=-1, keepdims=True))
    shifted_xV = logits_xV - top_x1
    # A comparison, not a gather: it fuses with the sum, and it stays local when V is sharded.
    hit_xV = targets_x[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits_xV.shape, logits_xV.ndim - 1)
    return jnp.log(jnp.sum(jnp.exp(shifted_xV), axis=-1)) - jnp.sum(jnp.where(hit_xV, shifted_xV, 0.0), axis=-1)


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
    chunks = [_cut(x, size) for x in (h_BxTxD, targets_BxT, weights_BxT)]
    head, consts = jax.closure_convert(logits, chunks[0][0])
    return _chunked(head, *chunks, *consts)


def _cut(x_BxT: jax.Array, size: int) -> jax.Array:
    """`[B,T,...] -> [S,B,K,...]`, the end padded with zeros: rows of weight zero."""
    n_chunks = -(-x_BxT.shape[1] // size)
    pad = n_chunks * size - x_BxT.shape[1]
    x_BxT = jnp.pad(x_BxT, [(0, 0), (0, pad)] + [(0, 0)] * (x_BxT.ndim - 2))
    return jnp.moveaxis(x_BxT.reshape(x_BxT.shape[0], n_chunks, size, *x_BxT.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: Callable, h_SxBxKxD: Any, targets_SxBxK: Any, weights_SxBxK: Any, *consts: Any) -> jax.Array:
    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        h, targets, weights = chunk
        return total + jnp.sum(token_nll(head(h, *consts), targets) * weights), None

    return jax.lax.scan(add, jnp.float32(0), (h_SxBxKxD, targets_SxBxK, weights_SxBxK))[0]


def _chunked_fwd(head: Callable, *args: Any) -> tuple[jax.Array, Any]:
    """The sum, and its gradients for `h` and for those of `consts` that are perturbed (the others: None)."""
    h_SxBxKxD, targets_SxBxK, weights_SxBxK, *consts = [arg.value for arg in args]
    learned = [i for i, arg in enumerate(args[3:]) if arg.perturbed]

    def add(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        h_BxKxD, targets_BxK, weights_BxK = chunk

        def nll(h: jax.Array, some: dict[int, jax.Array]) -> jax.Array:
            whole = [some.get(i, const) for i, const in enumerate(consts)]
            return jnp.sum(token_nll(head(h, *whole), targets_BxK) * weights_BxK)

        total, dconsts = carry
        value, (dh, more) = jax.value_and_grad(nll, argnums=(0, 1))(h_BxKxD, {i: consts[i] for i in learned})
        return (total + value, jax.tree.map(lambda d, m: d + m.astype(d.dtype), dconsts, more)), dh

    zeros = {i: jnp.zeros(consts[i].shape, jnp.float32) for i in learned}
    chunks = (h_SxBxKxD, targets_SxBxK, weights_SxBxK)
    (total, dconsts), dh_SxBxKxD = jax.lax.scan(add, (jnp.float32(0), zeros), chunks)
    return total, (dh_SxBxKxD, [dconsts[i].astype(c.dtype) if i in dconsts else None for i, c in enumerate(consts)])


def _chunked_bwd(head: Callable, gradients: tuple, g: jax.Array) -> tuple:
    del head
    dh_SxBxKxD, dconsts = jax.tree.map(lambda d: d * g.astype(d.dtype), gradients)
    return dh_SxBxKxD, None, None, *dconsts


# Symbolic zeros tell which of the head's arrays are being differentiated.
_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
