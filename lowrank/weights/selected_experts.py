"""A few experts of many, each with a trained change of its own (ESFT, Wang et al. 2024, arXiv:2407.01906).

And the probe that tells which: a router's kernel whose gradient is how much each expert was used.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot,
    form,
    frozen,
    grouped,
    materialize,
    static,
    trainable,
)
from lowrank.weights.mixture import top_k_mask


@form
class SelectedExperts(Weight):
    """`W_e + delta_s` for the experts `e = rows[s]`, `W_e` for the others; `rows` `[..., S]` is E where a slot is free.

    `base` `[..., E, in, out]`, `delta` `[..., S, in, out]`: training W itself from W is training a change from 0.
    """

    base: Any = frozen(axes=KERNEL)
    delta: jax.Array = trainable(axes=KERNEL)
    rows: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """All experts, in the base's dtype."""
        base = materialize(self.base)
        add = lambda w, rows, delta: w.at[rows].add(delta, mode="drop")  # noqa: E731
        for _ in base.shape[:-3]:
            add = jax.vmap(add)
        return add(at_least_float32(base), self.rows, at_least_float32(self.delta)).astype(base.dtype)

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`x[i] @ W_g` and, for the rows of experts that have one, `x[i] @ delta`; only these meet a delta."""
        experts, slots = sizes.shape[0], self.rows.shape[0]
        slot_of = jnp.full(experts, slots).at[self.rows].set(jnp.arange(slots), mode="drop")
        slot = jnp.repeat(slot_of, sizes, total_repeat_length=x.shape[0])
        order = jnp.argsort(slot)
        counts = jnp.bincount(slot, length=slots + 1)[:slots].astype(jnp.int32)
        changed = jnp.arange(x.shape[0]) < jnp.sum(counts)
        update = jnp.where(changed[:, None], grouped(x[order], self.delta, counts), 0)
        return grouped(x, self.base, sizes) + update[jnp.argsort(order)]


def attach(w: Any, slots: int) -> SelectedExperts:
    """A Chosen on `w` `[..., E, in, out]` with `slots` free slots: the identity."""
    *stack, experts, n_in, n_out = w.shape
    free = jnp.full((*stack, slots), experts, jnp.int32)
    return SelectedExperts(base=w, delta=jnp.zeros((*stack, slots, n_in, n_out), jnp.float32), rows=free)


@form
class ExpertUsageProbe(Weight):
    """A router's kernel whose `tally` `[..., E]` gets as its gradient how much each expert was used.

    That is the sum over the tokens where `mask` `[..., rows, tokens]` is 1 of their gates (`score='gate'`) or of
    their shares of `per_token` choices (`'token'`).
    """

    base: Any = frozen(axes=KERNEL)
    tally: jax.Array = trainable(decay=False)
    mask: jax.Array = frozen()
    per_token: int = static(default=1)
    score: str = static(default="gate")
    normalise: bool = static(default=False)

    def materialize(self) -> jax.Array:
        """The router's kernel."""
        return materialize(self.base)

    def dot(self, x: jax.Array) -> jax.Array:
        """The router's logits, unchanged."""
        logits = dot(x, self.base)
        return _told(logits, self.tally, jax.lax.stop_gradient(self._use(logits)))

    def _use(self, logits: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(at_least_float32(logits), axis=-1)
        kept = top_k_mask(probs, self.per_token)
        gates = jnp.where(kept, probs, 0)
        if self.normalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        use = gates if self.score == "gate" else kept / self.per_token
        return jnp.sum(use * self.mask[..., None], axis=tuple(range(use.ndim - 1)))


@jax.custom_vjp
def _told(logits: jax.Array, tally: jax.Array, use: jax.Array) -> jax.Array:
    del tally, use
    return logits


_told.defvjp(lambda logits, tally, use: (logits, use), lambda use, g: (g, use, None))
