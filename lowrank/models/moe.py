"""The sparse mixture of experts, which replaces the MLP (Shazeer et al. 2017, arXiv:1701.06538).

Shapes: B rows, T tokens, N = B * T, D width, E experts, F their hidden width, K experts per token. Parameter names:
`router/kernel` `[D, E]`, `experts/{gate,up}/kernel` `[E, D, F]`, `experts/down/kernel` `[E, F, D]`, and with a shared
expert `shared/{gate,up,down}/kernel`, `shared_gate/kernel` `[D, 1]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core import weight
from lowrank.models.adapter_options import DOWN_INIT
from lowrank.models.layers import ACTIVATIONS, MLP, Linear, kernel_init, read_parameter


class Routing(NamedTuple):
    """The experts that each token uses, and their gates: both `[..., K]`."""

    gates: jax.Array
    experts: jax.Array


def route_tokens(logits: jax.Array, k: int, normalize: bool) -> Routing:
    """The k most likely experts of each token; gates are softmax probabilities, over their sum if `normalize`."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(probs, k)
    return Routing(gates / jnp.sum(gates, axis=-1, keepdims=True) if normalize else gates, experts)


class SortedTokens(NamedTuple):
    """`N * K` rows, one per token and expert of it, sorted by expert; `sizes` `[E]` counts the rows per expert."""

    tokens: jax.Array  # the token of each row
    gates: jax.Array  # the gate of each row
    sizes: jax.Array
    back: jax.Array  # the sorted index of row `n * K + k`


def sort_by_expert(routing_NxK: Routing, experts: int) -> SortedTokens:
    """The rows of a routing, sorted by expert."""
    ids = routing_NxK.experts.reshape(-1)
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=experts).astype(jnp.int32)
    gates = routing_NxK.gates.reshape(-1)[order]
    return SortedTokens(order // routing_NxK.experts.shape[-1], gates, sizes, jnp.argsort(order))


def combine_experts(y: jax.Array, rows: SortedTokens, k: int) -> jax.Array:
    """`[N, D]`: the sum of each token's k rows of `y`, weighted by their gates."""
    y = (y * rows.gates.astype(y.dtype)[:, None])[rows.back]
    return jnp.sum(y.reshape(-1, k, y.shape[-1]), axis=1)


class GroupedLinear(nn.Module):
    """`x @ kernel[expert of the row]` for rows sorted by expert; the kernel `[E, in, out]` may be any weight."""

    experts: int
    features: int
    initializer: Callable[..., jax.Array] = kernel_init

    @nn.compact
    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """`[rows, in] -> [rows, features]`."""
        kernel = read_parameter(self, "kernel", self.initializer, (self.experts, x.shape[-1], self.features))
        return weight.grouped(x, kernel, sizes_E)


class Experts(nn.Module):
    """`down(act(gate(x)) * up(x))` with the kernels of each row's expert."""

    experts: int
    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """`[rows, D] -> [rows, D]`, rows sorted by expert."""
        gate = GroupedLinear(self.experts, self.hidden, name="gate")(x, sizes_E)
        up = GroupedLinear(self.experts, self.hidden, name="up")(x, sizes_E)
        h = ACTIVATIONS[self.activation](gate) * up
        return GroupedLinear(self.experts, x.shape[-1], name="down")(h, sizes_E)


class RoutedAdapter(nn.Module):
    """Low-rank experts beside a mixture: `scale * sum_e g_e(x) x @ down_e @ up_e` (PERFT, arXiv:2411.08212).

    `up` is zero at first. `own` experts have a router of their own; with 0 they use the mixture's routing.
    """

    width: int
    own: int
    per_token: int
    scale: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, routing: Routing, experts: int, normalize: bool) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`; `routing` `[B, T, K]` is that of the mixture's `experts`."""
        if self.own:
            experts = self.own
            routing = route_tokens(Linear(experts, name="router")(x_BxTxD), self.per_token, normalize)
        D, k = x_BxTxD.shape[-1], routing.experts.shape[-1]
        rows = sort_by_expert(jax.tree.map(lambda r: r.reshape(-1, k), routing), experts)
        x = x_BxTxD.reshape(-1, D)[rows.tokens]
        low = GroupedLinear(experts, self.width, DOWN_INIT, name="down")(x, rows.sizes)
        y = GroupedLinear(experts, D, nn.initializers.zeros, name="up")(low, rows.sizes)
        y = combine_experts(y, rows, k).reshape(x_BxTxD.shape)
        return (weight.at_least_float32(y) * self.scale).astype(y.dtype)


class MoE(nn.Module):
    """The sum of each token's K experts, weighted by their gates, plus the shared expert and the routed adapter."""

    experts: int
    per_token: int
    hidden: int
    activation: str
    normalize: bool = False  # the gates of a token sum to 1
    shared: int = 0  # the hidden width of an expert that every token uses, weighted by a sigmoid
    routed: tuple[int, int, int, float] | None = None  # the fields of the RoutedAdapter

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        shape, D = x_BxTxD.shape, x_BxTxD.shape[-1]
        routing = route_tokens(Linear(self.experts, name="router")(x_BxTxD), self.per_token, self.normalize)
        rows = sort_by_expert(jax.tree.map(lambda r: r.reshape(-1, self.per_token), routing), self.experts)
        y = Experts(self.experts, self.hidden, self.activation, name="experts")(
            x_BxTxD.reshape(-1, D)[rows.tokens], rows.sizes
        )
        y = combine_experts(y, rows, self.per_token).reshape(shape)
        if self.routed is not None:
            y = y + RoutedAdapter(*self.routed, name="routed")(x_BxTxD, routing, self.experts, self.normalize)
        if not self.shared:
            return y
        gate = jax.nn.sigmoid(Linear(1, name="shared_gate")(x_BxTxD))
        shared = MLP(self.shared, self.activation, gated=True, name="shared")(x_BxTxD)
        return y + jnp.broadcast_to(gate, shape) * shared
