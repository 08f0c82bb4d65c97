"""Objectives: a weighted sum of losses and the weight to divide it by, so that sums over microbatches are exact.

Shapes: B batch, T time, D width, V vocabulary, C classes, S chunks of K positions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import unknown
from lowrank.core.typing import Batch, PyTree, Sums


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
        logits_BxC = model.apply({"params": params}, batch["pooled"], method="label_logits")
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
    stored and none are computed twice. Chunks cut T, so that a sharded B stays where it is. Positions of weight 0 are
    in the last chunks, and chunks of nothing else are left out: where answers alone count, prompts cost no head. What
    `logits` closes over gets a gradient only if it is being differentiated: a frozen head costs no dW. Targets and
    weights get none.
    """
    size = max(1, min(targets_BxT.shape[1], rows // len(targets_BxT)))
    head, consts = jax.closure_convert(logits, h_BxTxD[:, :size])
    order_BxT = jnp.argsort(weights_BxT == 0, axis=1, stable=True)
    return _chunked(head, size, h_BxTxD, targets_BxT, weights_BxT, order_BxT, *consts)


def _chunks(x_BxT: jax.Array, order_BxT: jax.Array, size: int) -> jax.Array:
    """`[B,T,...] -> [S,B,K,...]` in this order, the end padded with zeros: rows of weight zero."""
    x_BxT = _ordered(x_BxT, order_BxT)
    pad = -x_BxT.shape[1] % size
    x_BxT = jnp.pad(x_BxT, [(0, 0), (0, pad)] + [(0, 0)] * (x_BxT.ndim - 2))
    return jnp.moveaxis(x_BxT.reshape(x_BxT.shape[0], -1, size, *x_BxT.shape[2:]), 1, 0)


def _whole(x_SxBxK: jax.Array, order_BxT: jax.Array) -> jax.Array:
    """The inverse of `_chunks`."""
    x_BxT = jnp.moveaxis(x_SxBxK, 0, 1).reshape(x_SxBxK.shape[1], -1, *x_SxBxK.shape[3:])
    return _ordered(x_BxT, jnp.argsort(order_BxT, axis=1))


def _ordered(x_BxT: jax.Array, order_BxT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxT, order_BxT.reshape(order_BxT.shape + (1,) * (x_BxT.ndim - 2)), axis=1)


def _live(weights_SxBxK: jax.Array) -> jax.Array:
    """How many chunks hold a weight; they are the first ones."""
    return jnp.sum(jnp.any(weights_SxBxK != 0, axis=(1, 2)), dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(head: Callable, size: int, h: Any, targets: Any, weights: Any, order: Any, *consts: Any) -> jax.Array:
    h_SxBxKxD, targets_SxBxK, weights_SxBxK = (_chunks(x, order, size) for x in (h, targets, weights))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + jnp.sum(token_nll(head(h_SxBxKxD[i], *consts), targets_SxBxK[i]) * weights_SxBxK[i])

    return jax.lax.fori_loop(0, _live(weights_SxBxK), add, jnp.float32(0))


def _chunked_fwd(head: Callable, size: int, *args: Any) -> tuple[jax.Array, Any]:
    """The sum, and its gradients for `h` and for those of `consts` that are perturbed (the others: None)."""
    h, targets, weights, order, *consts = [arg.value for arg in args]
    # Ordered in here and put back by a gather: left to autodiff, the way back would be a scatter.
    h_SxBxKxD, targets_SxBxK, weights_SxBxK = (_chunks(x, order, size) for x in (h, targets, weights))
    learned = [i for i, arg in enumerate(args[4:]) if arg.perturbed]

    def add(i: jax.Array, carry: Any) -> Any:
        def nll(h: jax.Array, some: dict[int, jax.Array]) -> jax.Array:
            whole = [some.get(n, const) for n, const in enumerate(consts)]
            return jnp.sum(token_nll(head(h, *whole), targets_SxBxK[i]) * weights_SxBxK[i])

        total, dh_SxBxKxD, dconsts = carry
        value, (dh, more) = jax.value_and_grad(nll, argnums=(0, 1))(h_SxBxKxD[i], {n: consts[n] for n in learned})
        return total + value, dh_SxBxKxD.at[i].set(dh), jax.tree.map(lambda d, m: d + m.astype(d.dtype), dconsts, more)

    zeros = {n: jnp.zeros(consts[n].shape, jnp.float32) for n in learned}
    start = jnp.float32(0), jnp.zeros_like(h_SxBxKxD), zeros
    total, dh_SxBxKxD, dconsts = jax.lax.fori_loop(0, _live(weights_SxBxK), add, start)
    dconsts = [dconsts[n].astype(c.dtype) if n in dconsts else None for n, c in enumerate(consts)]
    return total, (_whole(dh_SxBxKxD, order), dconsts)


def _chunked_bwd(head: Callable, size: int, gradients: tuple, g: jax.Array) -> tuple:
    del head, size
    dh_BxTxD, dconsts = jax.tree.map(lambda d: d * g.astype(d.dtype), gradients)
    return dh_BxTxD, None, None, None, *dconsts


# Symbolic zeros tell which of the head's arrays are being differentiated.
_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
