"""Mixtures of LoRAs, which a router weighs token by token, and LoRAs that their layer's router gates prompt by prompt.

Their updates depend on the input, so they have no merged kernel. E experts of rank r lie side by side: A is
`[in, E * r]` and B is `[E * r, out]`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, Weight, at_least_float32, dot, dot_to_float32, form, frozen, static, trainable
from lowrank.weights.gains import scale_rounded
from lowrank.weights.lora import LoRA, project_up


@jax.custom_vjp
def with_balance_loss(probs: jax.Array, chosen: jax.Array, mask: jax.Array, strength: jax.Array) -> jax.Array:
    """`probs` `[..., E]`, to whose gradient that of the balance loss is added (Switch, arXiv:2101.03961).

    The balance loss is `strength * E * sum_e f_e P_e`. f_e is the mean of `chosen` `[..., E]`, each token's shares of
    its experts, over the tokens where `mask` `[...]` is 1; P_e is the same mean of `probs`. f is held constant. So a
    weight, which sees only its input, can add to the loss; the reported loss does not include the balance loss. The
    derivative with respect to `strength` is `E * sum_e f_e P_e`.
    """
    del chosen, mask, strength
    return probs


def _balance_loss_fwd(
    probs: jax.Array, chosen: jax.Array, mask: jax.Array, strength: jax.Array
) -> tuple[jax.Array, Any]:
    return probs, (probs, chosen, mask, strength)


def _balance_loss_bwd(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None, jax.Array]:
    probs, chosen, mask, strength = residuals
    mask = jnp.broadcast_to(mask, chosen.shape[:-1]).astype(g.dtype)
    count = jnp.maximum(jnp.sum(mask), 1)
    rows = tuple(range(mask.ndim))
    share = jnp.sum(chosen.astype(g.dtype) * mask[..., None], axis=rows) / count
    factor = strength.astype(g.dtype) * chosen.shape[-1] / count * mask[..., None]
    mean = jnp.sum(probs * mask[..., None], axis=rows) / count
    value = (chosen.shape[-1] * jnp.sum(share * mean)).astype(strength.dtype)
    return g + factor * jnp.broadcast_to(share, g.shape), None, None, value


with_balance_loss.defvjp(_balance_loss_fwd, _balance_loss_bwd)


def top_k_mask(probs: jax.Array, k: int) -> jax.Array:
    """`[..., E]` bool: True at the k largest values of each row; of equal values, the first count as larger."""
    indices = jax.lax.top_k(probs, k)[1]
    return jnp.any(jax.nn.one_hot(indices, probs.shape[-1], dtype=bool), axis=-2)


def top_k_gates(
    logits: jax.Array, k: int, mask: jax.Array | None = None, strength: jax.Array | None = None
) -> jax.Array:
    """The softmax of `logits` `[..., E]` over the k largest of each row, 0 elsewhere.

    The gradient includes that of the balance loss if `strength` is given.
    """
    probs = jax.nn.softmax(at_least_float32(logits), axis=-1)
    chosen = jax.lax.stop_gradient(top_k_mask(probs, k))
    if strength is not None:
        probs = with_balance_loss(probs, chosen / k, mask, strength)
    probs = jnp.where(chosen, probs, 0)
    return probs / jnp.sum(probs, axis=-1, keepdims=True)


class Routed(Weight):
    """A weight whose update depends on its input."""

    def materialize(self) -> jax.Array:
        """Raises UserError, since the update is not one kernel."""
        raise UserError(
            f"{type(self).__name__} routes each input to other experts, so it cannot be merged into one kernel: save "
            "and load it as an adapter"
        )


@form
class Mixture(Routed):
    """`x @ W + scale * sum_e g_e(x) x @ A_e @ B_e`, g the top-k softmax of `x @ router`, `router` `[..., in, E]`."""

    base: Any = frozen(axes=KERNEL)
    a: jax.Array = trainable(axes=("in", None))
    b: jax.Array = trainable(axes=(None, "out"))
    router: jax.Array = trainable()
    scale: jax.Array = frozen()
    mask: jax.Array | None = frozen(default=None)  # the tokens that count in the balance loss, bound for one step
    strength: jax.Array | None = frozen(default=None)  # the balance loss's strength, bound together with the mask
    per_token: int = static(default=1)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., out]`; the products of rank r of all experts are formed, then weighed by the gates."""
        g = top_k_gates(dot(x, self.router), self.per_token, self.mask, self.strength) * self.scale
        low = scale_rounded(dot(x, self.a).reshape(*x.shape[:-1], g.shape[-1], -1), g[..., None])
        return dot_to_float32(x, self.base) + at_least_float32(project_up(low.reshape(*x.shape[:-1], -1), self.b))


def attach(key: jax.Array, w: Any, *, rank: int, experts: int, alpha: float, per_token: int) -> Mixture:
    """A Mixture on `w` `[..., in, out]` that starts as the identity: every B is zero, A and the router are random."""
    stack, (n_in, n_out) = w.shape[:-2], w.shape[-2:]
    a_key, router_key = jax.random.split(key)
    bound = n_in**-0.5
    return Mixture(
        base=w,
        a=jax.random.uniform(a_key, (*stack, n_in, experts * rank), minval=-bound, maxval=bound),
        b=jnp.zeros((*stack, experts * rank, n_out), jnp.float32),
        router=jax.random.normal(router_key, (*stack, n_in, experts)) * bound,
        scale=jnp.full(stack, alpha / rank, jnp.float32),
        per_token=per_token,
    )


@form
class Gated(LoRA):
    """A LoRA whose update is multiplied by `gate` `[rows, tokens or 1]`, one of its layer's gates.

    The layer's router computes the gates, and `with_gates` sets this one before each product.
    """

    gate: jax.Array | None = frozen(default=None)
    member: int = static(default=0)  # the index of this LoRA's gate among the gates of its layer

    materialize = Routed.materialize

    def with_gates(self, gates: jax.Array) -> "Gated":
        """The LoRA with its own gate out of the layer's gates `[rows, tokens or 1, members]`."""
        return dataclasses.replace(self, gate=gates[..., self.member])

    def low_rank_update(self, x: jax.Array) -> jax.Array:
        """`gate * scale * x @ A @ B` for `x: [rows, tokens, in]`."""
        if self.gate is None:
            raise UserError(
                "this LoRA is gated by the prompt, and it has no gate: bind it to a batch, in a layer with a router"
            )
        return scale_rounded(LoRA.low_rank_update(self, x), self.gate[..., None])

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Raises UserError, since the rows of one expert come from many prompts."""
        raise UserError(
            "the kernels of experts multiply rows of many prompts, so they cannot be gated by the prompt: leave them "
            "out of the method's targets"
        )


@form
class PromptRouter(Weight):
    """A router whose gates are `per_prompt * top-k softmax of gelu(mean of the prompt's hidden states) @ kernel`.

    `kernel` is `[..., D, members]`. Tokens with equal entries of `segments` `[..., rows, tokens]` form one sequence,
    and `prompt` `[..., rows, tokens]` marks those that belong to its prompt. Without `prompt`, each row is one prompt
    and has one row of gates.
    """

    kernel: jax.Array = trainable()
    segments: jax.Array = frozen()
    prompt: jax.Array | None = frozen(default=None)
    strength: jax.Array | None = frozen(default=None)  # the balance loss's strength
    per_prompt: int = static(default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., D, members]`."""
        return self.kernel.shape

    def gates(self, h: jax.Array) -> jax.Array:
        """The gates `[rows, tokens or 1, members]`, in float32, for hidden states `h: [rows, tokens, D]`."""
        pooled = self._pooled(at_least_float32(h))
        mask = (self.segments > 0)[:, : pooled.shape[1]]
        logits = dot(jax.nn.gelu(pooled), self.kernel)
        return top_k_gates(logits, self.per_prompt, mask, self.strength) * self.per_prompt

    def _pooled(self, h: jax.Array) -> jax.Array:
        """The mean of `h` over the prompt of each token's sequence, `[rows, tokens or 1, D]`."""
        if self.prompt is None:
            prompts = (self.segments > 0)[:, None, :]
        else:
            prompts = (self.segments[:, :, None] == self.segments[:, None, :]) & self.prompt[:, None, :]
        count = jnp.maximum(jnp.sum(prompts, axis=-1, keepdims=True), 1).astype(h.dtype)
        return jnp.matmul(prompts.astype(h.dtype), h) / jnp.broadcast_to(count, (*count.shape[:2], h.shape[-1]))
