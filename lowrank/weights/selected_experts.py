"""Experts of which a few selected ones have a trained update (ESFT, Wang et al. 2024, arXiv:2407.01906).

The probe that selects them is here too: a router's kernel whose gradient is the usage of each expert.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot_to_float32,
    form,
    frozen,
    grouped_to_float32,
    materialize,
    static,
    trainable,
)
from lowrank.weights.mixture import top_k_mask


@form
class SelectedExperts(Weight):
    """`W_e + delta_s` for the experts `e = rows[s]`, and `W_e` for the others.

    `base` is `[..., E, in, out]`, `delta` is `[..., S, in, out]`, and `rows` `[..., S]` holds E where a slot is free.
    Training an update from 0 is the same as training the expert's kernel itself, except for weight decay, which draws
    the kernel to the pretrained one.
    """

    base: Any = frozen(axes=KERNEL)
    delta: jax.Array = trainable(axes=KERNEL, change=True)
    rows: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """All experts, in the base's dtype."""
        base = materialize(self.base)
        add = lambda w, rows, delta: w.at[rows].add(delta, mode="drop")  # noqa: E731
        for _ in base.shape[:-3]:
            add = jax.vmap(add)
        return add(at_least_float32(base), self.rows, at_least_float32(self.delta)).astype(base.dtype)

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x[i] @ W_g`, plus `x[i] @ delta_s` for the rows of selected experts, which alone are multiplied by it."""
        experts, slots = sizes.shape[0], self.rows.shape[0]
        slot_of = jnp.full(experts, slots).at[self.rows].set(jnp.arange(slots), mode="drop")
        slot = jnp.repeat(slot_of, sizes, total_repeat_length=x.shape[0])
        order = jnp.argsort(slot)
        counts = jnp.bincount(slot, length=slots + 1)[:slots].astype(jnp.int32)
        changed = jnp.arange(x.shape[0]) < jnp.sum(counts)
        update = jnp.where(changed[:, None], grouped_to_float32(x[order], self.delta, counts), 0)
        return grouped_to_float32(x, self.base, sizes) + update[jnp.argsort(order)]


def attach(w: Any, slots: int) -> SelectedExperts:
    """A SelectedExperts on `w` `[..., E, in, out]` with `slots` free slots, which starts as the identity."""
    *stack, experts, n_in, n_out = w.shape
    free = jnp.full((*stack, slots), experts, jnp.int32)
    return SelectedExperts(base=w, delta=jnp.zeros((*stack, slots, n_in, n_out), jnp.float32), rows=free)


@form
class ExpertUsageProbe(Weight):
    """A router's kernel with a `tally` `[..., E]` whose gradient is the usage of each expert.

    The usage is the sum, over the tokens where `mask` `[..., rows, tokens]` is 1, of the expert's gates
    (`score='gate'`) or of its shares of each token's `per_token` choices (`score='token'`).
    """

    base: Any = frozen(axes=KERNEL)
    tally: jax.Array = trainable(decay=False)
    mask: jax.Array = frozen()
    per_token: int = static(default=1)
    score: str = static(default="gate")
    normalize_gates: bool = static(default=False)

    def materialize(self) -> jax.Array:
        """The router's kernel."""
        return materialize(self.base)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """The router's logits, unchanged."""
        logits = dot_to_float32(x, self.base)
        return _with_tally_gradient(logits, self.tally, jax.lax.stop_gradient(self._usage(logits)))

    def _usage(self, logits: jax.Array) -> jax.Array:
        """The usage `[E]` of each expert, from the router's logits `[rows, tokens, E]`."""
        probs = jax.nn.softmax(at_least_float32(logits), axis=-1)
        chosen = top_k_mask(probs, self.per_token)
        gates = jnp.where(chosen, probs, 0)
        if self.normalize_gates:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        usage = gates if self.score == "gate" else chosen / self.per_token
        return jnp.sum(usage * self.mask[..., None], axis=tuple(range(usage.ndim - 1)))


@jax.custom_vjp
def _with_tally_gradient(logits: jax.Array, tally: jax.Array, usage: jax.Array) -> jax.Array:
    """The logits as they are; the gradient of `tally` is `usage`."""
    del tally, usage
    return logits


_with_tally_gradient.defvjp(lambda logits, tally, usage: (logits, usage), lambda usage, g: (g, usage, None))
