"""A sparse mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538).

Shapes: B rows, T tokens, N = B * T, D width, E experts, F their hidden width, K experts a token. Parameter names:
`router/kernel` `[D, E]`, `experts/{gate,up}/kernel` `[E, D, F]`, `experts/down/kernel` `[E, F, D]`, and with a shared
expert `shared/{gate,up,down}/kernel`, `shared_gate/kernel` `[D, 1]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core import weight
from lowrank.models.adapter_options import DOWN_INIT
from lowrank.models.layers import ACTIVATIONS, MLP, Linear, kernel_init, stored


class Routing(NamedTuple):
    """Which experts each token goes to, and what each of them weighs: both `[..., K]`."""

    gates: jax.Array
    experts: jax.Array


def route(logits: jax.Array, k: int, normalise: bool) -> Routing:
    """The k most likely experts of each token; gates are their softmax probabilities, or those over their sum."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(probs, k)
    return Routing(gates / jnp.sum(gates, axis=-1, keepdims=True) if normalise else gates, experts)


class Sorted(NamedTuple):
    """`N * K` rows, one for each token and expert of it, sorted by expert; `sizes` `[E]` says how many each has."""

    tokens: jax.Array  # the token of each row
    gates: jax.Array  # its weight
    sizes: jax.Array
    back: jax.Array  # where row `n * K + k` went


def by_expert(routing_NxK: Routing, experts: int) -> Sorted:
    """The rows of a routing, sorted by expert."""
    ids = routing_NxK.experts.reshape(-1)
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=experts).astype(jnp.int32)
    gates = routing_NxK.gates.reshape(-1)[order]
    return Sorted(order // routing_NxK.experts.shape[-1], gates, sizes, jnp.argsort(order))


def gathered(y: jax.Array, rows: Sorted, k: int) -> jax.Array:
    """`[N, D]`: the sum of each token's k rows of `y`, weighted by their gates."""
    y = (y * rows.gates.astype(y.dtype)[:, None])[rows.back]
    return jnp.sum(y.reshape(-1, k, y.shape[-1]), axis=1)


class Grouped(nn.Module):
    """`x @ kernel[expert of the row]` for rows sorted by expert; the kernel `[E, in, out]` may be any weight."""

    experts: int
    features: int
    init: Any = kernel_init

    @nn.compact
    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """`[rows, in] -> [rows, features]`."""
        kernel = stored(self, "kernel", self.init, (self.experts, x.shape[-1], self.features))
        return weight.grouped(x, kernel, sizes_E)


class Experts(nn.Module):
    """`down(act(gate(x)) * up(x))` of the expert that each row belongs to."""

    experts: int
    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """`[rows, D] -> [rows, D]`, rows sorted by expert."""
        gate = Grouped(self.experts, self.hidden, name="gate")(x, sizes_E)
        up = Grouped(self.experts, self.hidden, name="up")(x, sizes_E)
        h = ACTIVATIONS[self.activation](gate) * up
        return Grouped(self.experts, x.shape[-1], name="down")(h, sizes_E)


class Routed(nn.Module):
    """Low-rank experts beside a mixture: `scale * sum_e g_e(x) x @ down_e @ up_e` (PERFT, arXiv:2411.08212).

    `up` is zero at first. With `own` experts they have a router; else they are routed as the mixture's.
    """

    width: int
    own: int
    per_token: int
    scale: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, routing: Routing, experts: int, normalise: bool) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`; `routing` `[B, T, K]` is what the mixture itself does with its `experts`."""
        if self.own:
            experts = self.own
            routing = route(Linear(experts, name="router")(x_BxTxD), self.per_token, normalise)
        D, k = x_BxTxD.shape[-1], routing.experts.shape[-1]
        rows = by_expert(jax.tree.map(lambda r: r.reshape(-1, k), routing), experts)
        low = Grouped(experts, self.width, DOWN_INIT, name="down")(x_BxTxD.reshape(-1, D)[rows.tokens], rows.sizes)
        y = Grouped(experts, D, nn.initializers.zeros, name="up")(low, rows.sizes)
        return self.scale * gathered(y, rows, k).reshape(x_BxTxD.shape)


class MoE(nn.Module):
    """The sum of each token's K experts, weighted by their gates, and of what stands beside them."""

    experts: int
    per_token: int
    hidden: int
    activation: str
    normalise: bool = False  # gates of a token sum to 1
    shared: int = 0  # hidden width of an expert that sees every token, weighted by a sigmoid
    routed: tuple[int, int, int, float] | None = None  # the fields of a Routed that stands beside it

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        shape, D = x_BxTxD.shape, x_BxTxD.shape[-1]
        routing = route(Linear(self.experts, name="router")(x_BxTxD), self.per_token, self.normalise)
        rows = by_expert(jax.tree.map(lambda r: r.reshape(-1, self.per_token), routing), self.experts)
        y = Experts(self.experts, self.hidden, self.activation, name="experts")(
            x_BxTxD.reshape(-1, D)[rows.tokens], rows.sizes
        )
        y = gathered(y, rows, self.per_token).reshape(shape)
        if self.routed is not None:
            y = y + Routed(*self.routed, name="routed")(x_BxTxD, routing, self.experts, self.normalise)
        if not self.shared:
            return y
        gate = jax.nn.sigmoid(Linear(1, name="shared_gate")(x_BxTxD))
        shared = MLP(self.shared, self.activation, gated=True, name="shared")(x_BxTxD)
        return y + jnp.broadcast_to(gate, shape) * shared
