"""Cross-entropy of tokens, at once or over chunks of the logits.

Shapes: B batch, T time, D width, V vocabulary, S chunks of K positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

SHARDING = ("fsdp", "context")  # the mesh's axes over which a head is gathered where it is used
Head = Callable[..., jax.Array]  # hidden states [..., D] -> logits [..., V]


def token_nll(logits_xV: jax.Array, targets_x: jax.Array) -> jax.Array:
    """`-log softmax(logits)[target]` for `[..., V]` and `[...]`, in float32."""
    logits_xV = logits_xV.astype(jnp.float32)
    top_x1 = jax.lax.stop_gradient(jnp.max(logits_xV, axis=-1, keepdims=True))
    shifted_xV = logits_xV - top_x1
    # A comparison, not a gather: it fuses with the sum, and it stays local when V is sharded.
    hit_xV = targets_x[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits_xV.shape, logits_xV.ndim - 1)
    return jnp.log(jnp.sum(jnp.exp(shifted_xV), axis=-1)) - jnp.sum(jnp.where(hit_xV, shifted_xV, 0.0), axis=-1)


def chunked_nll(
    head: Head, h_BxTxD: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array, chunk_tokens: int
) -> jax.Array:
    """`sum(weights * token_nll(head(h), targets))` with the logits of about `chunk_tokens` tokens alive at a time.

    The gradient is computed in the forward pass, chunk by chunk, while a chunk's logits exist: no logits are stored
    and none are computed twice. Chunks cut T, so that a sharded B stays in its place. Positions of weight 0 are sorted
    to the end, and chunks of nothing else are skipped: where answers alone count, prompts cost no head. Arrays that
    `head` closes over get a gradient only if they are being differentiated: a frozen head costs no dW, and its shards
    are gathered once for all chunks. Targets and weights get no gradient.
    """
    return _chunked_nll(head, h_BxTxD, targets_BxT, weights_BxT, chunk_tokens, per_token=False)


def chunked_token_nll(
    head: Head, h_BxTxD: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array, chunk_tokens: int
) -> jax.Array:
    """`[B, T]`: `weights * token_nll(head(h), targets)`, whose sum is `chunked_nll`.

    The backward pass scales the gradient of each token that the forward pass has computed. The arrays of a trained head
    need a second pass over the logits, since their gradient is a sum over tokens.
    """
    return _chunked_nll(head, h_BxTxD, targets_BxT, weights_BxT, chunk_tokens, per_token=True)


def chunk_length(rows: int, length: int, chunk_tokens: int) -> int:
    """K: the positions of each row in a chunk of about `chunk_tokens` tokens of `rows` rows of `length` positions."""
    return max(1, min(length, chunk_tokens // rows))


def _chunked_nll(
    head: Head, h: jax.Array, targets: jax.Array, weights: jax.Array, chunk_tokens: int, per_token: bool
) -> jax.Array:
    rows, length = targets.shape
    size = chunk_length(rows, length, chunk_tokens)
    closed, consts = jax.closure_convert(head, h[:, :size])
    order_BxT = jnp.argsort(weights == 0, axis=1, stable=True)
    return _chunked(_Static(closed, size, per_token), h, targets, weights, order_BxT, *consts)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The arguments of the chunked loss that are not arrays."""

    head: Head
    size: int  # K
    per_token: bool

    def nll(self, h_BxKxD: jax.Array, targets_BxK: jax.Array, weights_BxK: jax.Array, consts: Any) -> jax.Array:
        """The weighted sum of one chunk, a scalar, or its terms `[B,K]` per token."""
        nll_BxK = token_nll(self.head(h_BxKxD, *consts), targets_BxK) * weights_BxK
        return nll_BxK if self.per_token else jnp.sum(nll_BxK)

    def zero(self, order_SxBxK: jax.Array) -> jax.Array:
        """The sum of no chunk, or `[S,B,K]` per token."""
        return jnp.zeros(order_SxBxK.shape if self.per_token else (), jnp.float32)

    def add(self, total: jax.Array, i: jax.Array, chunk: jax.Array) -> jax.Array:
        """The sum with chunk `i`, or the terms with those of chunk `i` in their place."""
        return total.at[i].set(chunk) if self.per_token else total + chunk

    def result(self, total: jax.Array, order_BxT: jax.Array) -> jax.Array:
        """The sum, or the terms `[B,T]` in their first order."""
        return _unchunked(total, order_BxT) if self.per_token else total


def _chunks(order_BxT: jax.Array, size: int, *arrays_BxT: jax.Array) -> list[jax.Array]:
    """The order, and the arrays in this order, each `[S,B,K]`; the end is padded: T, and 0 for the arrays."""
    pad = -order_BxT.shape[1] % size
    ordered = order_BxT, *(jnp.take_along_axis(x, order_BxT, axis=1) for x in arrays_BxT)
    fills = (order_BxT.shape[1], *(0 for _ in arrays_BxT))
    padded = [jnp.pad(x, ((0, 0), (0, pad)), constant_values=c) for x, c in zip(ordered, fills, strict=True)]
    return [jnp.moveaxis(x.reshape(len(x), -1, size), 1, 0) for x in padded]


def _rows(h_BxTxD: jax.Array, places_BxK: jax.Array) -> jax.Array:
    """`[B,K,D]`: the hidden states of one chunk, zeros at the place T. No ordered copy of all of them is made."""
    return jnp.take_along_axis(h_BxTxD, places_BxK[..., None], axis=1, mode="fill", fill_value=0)


def _unchunked(x_SxBxK: jax.Array, order_BxT: jax.Array) -> jax.Array:
    """`[B,T,...]`: the entries `[S,B,K,...]` of all chunks in their first order."""
    x_BxT = jnp.moveaxis(x_SxBxK, 0, 1).reshape(x_SxBxK.shape[1], -1, *x_SxBxK.shape[3:])
    back_BxT = jnp.argsort(order_BxT, axis=1)
    return jnp.take_along_axis(x_BxT, back_BxT.reshape(*back_BxT.shape, *(1,) * (x_BxT.ndim - 2)), axis=1)


def _weighted_chunks(weights_SxBxK: jax.Array) -> jax.Array:
    """The number of chunks that hold a weight; they are the first ones."""
    return jnp.sum(jnp.any(weights_SxBxK != 0, axis=(1, 2)), dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static: _Static, h: Any, targets: Any, weights: Any, order: Any, *consts: Any) -> jax.Array:
    order_SxBxK, targets_SxBxK, weights_SxBxK = _chunks(order, static.size, targets, weights)
    whole = _gathered(consts)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return static.add(total, i, static.nll(_rows(h, order_SxBxK[i]), targets_SxBxK[i], weights_SxBxK[i], whole))

    total = jax.lax.fori_loop(0, _weighted_chunks(weights_SxBxK), add, static.zero(order_SxBxK))
    return static.result(total, order)


def _chunked_fwd(static: _Static, *args: Any) -> tuple[jax.Array, Any]:
    """The sum, and its gradients for `h` and for those of `consts` that are perturbed (the others: None)."""
    h, targets, weights, order, *consts = [arg.value for arg in args]
    # Ordered in here and put back by a gather: left to autodiff, the way back would be a scatter.
    order_SxBxK, targets_SxBxK, weights_SxBxK = _chunks(order, static.size, targets, weights)
    learned = [i for i, arg in enumerate(args[4:]) if arg.perturbed]
    in_forward = [] if static.per_token else learned
    consts = _gathered(consts, leave=in_forward)

    def add(i: jax.Array, carry: Any) -> Any:
        def nll(h: jax.Array, some: dict[int, jax.Array]) -> jax.Array:
            return static.nll(h, targets_SxBxK[i], weights_SxBxK[i], _replaced(consts, some))

        total, dh_SxBxKxD, dconsts = carry
        value, vjp = jax.vjp(nll, _rows(h, order_SxBxK[i]), {n: consts[n] for n in in_forward})
        dh, more = vjp(jnp.ones_like(value))
        dconsts = jax.tree.map(lambda d, m: d + m.astype(d.dtype), dconsts, more)
        return static.add(total, i, value), dh_SxBxKxD.at[i].set(dh), dconsts

    start = static.zero(order_SxBxK), jnp.zeros((*order_SxBxK.shape, h.shape[-1]), h.dtype), _zeros(consts, in_forward)
    total, dh_SxBxKxD, dconsts = jax.lax.fori_loop(0, _weighted_chunks(weights_SxBxK), add, start)
    total, dh_BxTxD = static.result(total, order), _unchunked(dh_SxBxKxD, order)
    if static.per_token:  # the gradient of the head waits for the tokens' cotangents; the dict's keys stay static
        inputs = (h, targets, weights, order, consts, dict.fromkeys(learned)) if learned else None
        return total, (dh_BxTxD, [None] * len(consts), inputs)
    return total, (dh_BxTxD, [dconsts[n].astype(c.dtype) if n in dconsts else None for n, c in enumerate(consts)])


def _chunked_bwd(static: _Static, residuals: tuple, g: jax.Array) -> tuple:
    if not static.per_token:
        dh_BxTxD, dconsts = jax.tree.map(lambda d: d * g.astype(d.dtype), residuals)
        return dh_BxTxD, None, None, None, *dconsts
    dh_BxTxD, dconsts, inputs = residuals
    dconsts = _head_gradient(static, inputs, g) if inputs else dconsts
    return dh_BxTxD * g[..., None].astype(dh_BxTxD.dtype), None, None, None, *dconsts


def _head_gradient(
    static: _Static, inputs: tuple[Any, Any, Any, Any, Any, dict[int, None]], g_BxT: Any
) -> list[jax.Array | None]:
    """The gradient of the tokens' terms, weighted by `g`, for the arrays of the head that are `learned`."""
    h, targets, weights, order, consts, learned = inputs
    order_SxBxK, targets_SxBxK, weights_SxBxK, g_SxBxK = _chunks(order, static.size, targets, weights, g_BxT)

    def add(i: jax.Array, dconsts: Any) -> Any:
        def nll(some: dict[int, jax.Array]) -> jax.Array:
            whole = _replaced(consts, some)
            nll_BxK = static.nll(_rows(h, order_SxBxK[i]), targets_SxBxK[i], weights_SxBxK[i], whole)
            return jnp.sum(nll_BxK * g_SxBxK[i])

        more = jax.grad(nll)({n: consts[n] for n in learned})
        return jax.tree.map(lambda d, m: d + m.astype(d.dtype), dconsts, more)

    dconsts = jax.lax.fori_loop(0, _weighted_chunks(weights_SxBxK), add, _zeros(consts, learned))
    return [dconsts[n].astype(c.dtype) if n in dconsts else None for n, c in enumerate(consts)]


def _gathered(consts: Sequence[jax.Array], leave: Sequence[int] = ()) -> list[jax.Array]:
    """The arrays, but those in `leave`, whole on each device but for the mesh's axis `tensor`.

    In a loop over chunks, the compiler would gather the shards of each again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis in SHARDING if not mesh.empty and mesh.shape.get(axis, 1) > 1}
    if not axes or mesh.manual_axes:
        return list(consts)
    gather = jax.shard_map(lambda x: x, in_specs=P(), out_specs=P(), axis_names=axes, check_vma=False)
    return [const if n in leave else gather(const) for n, const in enumerate(consts)]


def _replaced(consts: Any, some: dict[int, jax.Array]) -> list[jax.Array]:
    return [some.get(n, const) for n, const in enumerate(consts)]


def _zeros(consts: Any, indices: Iterable[int]) -> dict[int, jax.Array]:
    return {n: jnp.zeros(consts[n].shape, jnp.float32) for n in indices}


# Symbolic zeros tell which of the head's arrays are being differentiated.
_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
