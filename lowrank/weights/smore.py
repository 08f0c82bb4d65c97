"""S'MoRE: a tree of residual low-rank experts (Zeng et al. 2025, arXiv:2504.06426).

Level l of L levels (level 0 holds the leaves) has E_l experts of rank r. A token is routed from the root down. The
children of a node are the f_l experts of level l with the largest `query . key`. The query is an MLP,
`relu(c @ hidden) @ queries`, of the context c: the narrowed token, and the keys of the node and its ancestors. The
output of a node is `x_(l+1) = sum_i g_i act(A_i B_i x + W_l x_l(i))` over its children i; leaves have no second term.
The update is the root's output times `up`. The widths are `d_(l+1) = d_l + E_l r` with `d_0 = 0`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import KERNEL, at_least_float32, dot, dot_to_float32, form, frozen, static, trainable
from lowrank.weights.gains import scale
from lowrank.weights.mixture import Routed, top_k_mask, with_balance_loss

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda x: x}


@form
class SMoRE(Routed):
    """`x @ W + scale * x_L @ up`; in every tuple the leaves' level comes first."""

    base: Any = frozen(axes=KERNEL)
    narrow: jax.Array = trainable()  # [..., in, g]: the projection of a token for the routers
    hidden: tuple[jax.Array, ...] = trainable()  # [..., g * (L - l), g]: the first layer of the queries' MLP
    queries: tuple[jax.Array, ...] = trainable()  # [..., g, g]: its second layer
    keys: tuple[jax.Array, ...] = trainable()  # [..., E_l, g]
    downs: tuple[jax.Array, ...] = trainable()  # A: [..., in, E_l * r]
    ups: tuple[jax.Array, ...] = trainable()  # B: [..., E_l, r, d_(l+1)]
    mixes: tuple[jax.Array, ...] = trainable()  # W_l of the levels from 1 on: [..., d_l, d_(l+1)]
    up: jax.Array = trainable()  # [..., d_L, out], which starts at zero
    scale: jax.Array = frozen()
    mask: jax.Array | None = frozen(default=None)  # the tokens that count in the balance loss, bound for one step
    strength: jax.Array | None = frozen(default=None)  # the balance loss's strength, bound together with the mask
    fanout: tuple[int, ...] = static(default=(1,))
    activation: str = static(default="tanh")

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., out]`."""
        token = dot(x, self.narrow)[..., None, :]
        root = self._node(len(self.fanout) - 1, x, token)[..., 0, :]
        return dot_to_float32(x, self.base) + at_least_float32(dot(root, self.up)) * self.scale

    def _node(self, level: int, x: jax.Array, context: jax.Array) -> jax.Array:
        """The outputs `[..., P, d_(l+1)]` of P nodes, whose `context` `[..., P, c]` is the token and the keys above."""
        keys, k = self.keys[level].astype(x.dtype), self.fanout[level]
        query = dot(jax.nn.relu(dot(context, self.hidden[level])), self.queries[level])
        gates, children = self._route(dot(query, keys.T), k)
        residuals = self._residuals(level, x)[..., None, :, :]
        residuals = jnp.broadcast_to(residuals, (*children.shape[:-1], *residuals.shape[-2:]))
        h = jnp.take_along_axis(residuals, children[..., None], axis=-2)  # [..., P, k, d_(l+1)]
        if level:
            above = jnp.broadcast_to(context[..., None, :], (*children.shape, context.shape[-1]))
            below = jnp.concatenate([above, keys[children]], axis=-1)
            flat = below.reshape(*below.shape[:-3], -1, below.shape[-1])
            outputs = self._node(level - 1, x, flat)
            outputs = outputs.reshape(*children.shape, outputs.shape[-1])
            h = h + dot(outputs, self.mixes[level - 1])
        outputs = ACTIVATIONS[self.activation](h)
        return jnp.sum(scale(at_least_float32(outputs), gates[..., None], outputs), axis=-2).astype(x.dtype)

    def _route(self, logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """`(gates, children)`, both `[..., P, k]`: the softmax over the k largest logits, and their indices."""
        probs = jax.nn.softmax(at_least_float32(logits), axis=-1)
        if self.strength is not None and self.mask is not None:
            chosen = jax.lax.stop_gradient(top_k_mask(probs, k))
            probs = with_balance_loss(probs, chosen / k, self.mask[..., None], self.strength)
        gates, children = jax.lax.top_k(probs, k)
        return gates / jnp.sum(gates, axis=-1, keepdims=True), children

    def _residuals(self, level: int, x: jax.Array) -> jax.Array:
        """`A_i B_i x` of every expert of a level, `[..., E_l, d_(l+1)]`, which is the same below every node."""
        low = dot(x, self.downs[level]).reshape(*x.shape[:-1], self.ups[level].shape[0], -1)
        return jnp.einsum("...er,erd->...ed", low, self.ups[level].astype(x.dtype))


def attach(
    key: jax.Array, w: Any, *, rank: int, experts: Sequence[int], fanout: Sequence[int], gate: int, **options: Any
) -> SMoRE:
    """A SMoRE on `w` `[..., in, out]` that starts as the identity.

    `experts` and `fanout` hold E_l and f_l, the leaves first; `gate` is the width g of the narrowed token; `options`
    are the form's `scale` and `activation`.
    """
    stack, (n_in, n_out), levels = w.shape[:-2], w.shape[-2:], len(experts)
    widths = [0]
    for count in experts:
        widths.append(widths[-1] + count * rank)

    def draw(name: int, level: int, shape: tuple[int, ...], fan: int) -> jax.Array:
        k = jax.random.fold_in(jax.random.fold_in(key, name), level)
        return jax.random.uniform(k, (*stack, *shape), minval=-(fan**-0.5), maxval=fan**-0.5)

    return SMoRE(
        base=w,
        narrow=draw(0, 0, (n_in, gate), n_in),
        hidden=tuple(draw(1, i, (gate * (levels - i), gate), gate * (levels - i)) for i in range(levels)),
        queries=tuple(draw(6, i, (gate, gate), gate) for i in range(levels)),
        keys=tuple(jnp.abs(draw(2, i, (experts[i], gate), 1)) for i in range(levels)),
        downs=tuple(draw(3, i, (n_in, experts[i] * rank), n_in) for i in range(levels)),
        ups=tuple(draw(4, i, (experts[i], rank, widths[i + 1]), rank) for i in range(levels)),
        mixes=tuple(draw(5, i, (widths[i], widths[i + 1]), widths[i]) for i in range(1, levels)),
        up=jnp.zeros((*stack, widths[-1], n_out), jnp.float32),
        scale=jnp.full(stack, options["scale"], jnp.float32),
        fanout=tuple(fanout),
        activation=options["activation"],
    )
