"""Which keys a query sees, described by the segments, positions and slots of the tokens in place of `[B, T, S]` bools.

Shapes: B rows (1 where all rows are alike), T queries, S keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PROMPT_SEGMENT = -1  # the segment of virtual tokens: all segments see them
PREFIX_SEGMENT = -2  # the segment of a prefix's keys: all segments see them, at any distance


class Tokens(NamedTuple):
    """The queries or the keys of a mask: int32 `[B, T]`, or None where the mask does not need them."""

    segments: jax.Array | None = None  # a token sees its own segment and those below 0; 0 is padding
    positions: jax.Array | None = None  # whose distance a window limits; None: the slots
    slots: jax.Array | None = None  # the places in the order of the sequence; None: 0, 1, ...

    def part(self, start: jax.Array | int, size: int) -> "Tokens":
        """The tokens `[start, start + size)`, with their slots and positions."""
        segments, positions, slots = (
            x if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in self
        )
        slots = start + jnp.arange(size, dtype=jnp.int32)[None] if slots is None else slots
        return Tokens(segments, slots if positions is None else positions, slots)

    def padded(self, size: int) -> "Tokens":
        """`size` tokens, those behind the last one being copies of it."""
        return self.map(lambda x: jnp.pad(x, ((0, 0), (0, size - x.shape[1])), mode="edge"))

    def map(self, change: Callable[[jax.Array], Any]) -> Any:
        """`change` applied to each array."""
        return jax.tree.map(change, self)


UNMARKED = Tokens()


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys that each query sees: those that pass every rule that is set. The default lets all keys pass."""

    queries: Tokens = UNMARKED
    keys: Tokens = UNMARKED
    local: jax.Array | None = None  # bool []: whether the window applies; None: it does
    virtual: bool = _static(False)  # whether segments below 0 occur
    causal: bool = _static(False)  # a query sees no slot behind its own
    window: int = _static(0)  # > 0: a query sees positions less than this far from its own, and the prefix
    prompt_sees_all: bool = _static(False)  # virtual tokens see the tokens of every segment but padding

    @property
    def is_static(self) -> bool:
        """Whether the mask depends on the slots 0, 1, ... alone."""
        return not jax.tree.leaves(self)

    def expand(self, T: int, S: int) -> jax.Array:
        """The mask as bools `[B, T, S]`."""
        return self.seen(self.queries.part(0, T), self.keys.part(0, S))

    def seen(self, queries: Tokens, keys: Tokens) -> jax.Array:
        """Whether each of the `queries` sees each of the `keys`, bools `[B, T, S]`; both are parts of the mask's."""
        return self.may_see((queries, queries), (keys, keys))

    def may_see(self, queries: tuple[Tokens, Tokens], keys: tuple[Tokens, Tokens]) -> jax.Array:
        """Whether a query between the first and the second of `queries` may see a key between those of `keys`.

        Each of T ranges of queries and S ranges of keys has a lower and an upper bound of its tokens. The result,
        `[B, T, S]`, is exact for ranges of one token; it may be true where the ranges hold no such pair.
        """
        q_low, q_high = (x.map(lambda x: x[:, :, None]) for x in queries)
        k_low, k_high = (x.map(lambda x: x[:, None, :]) for x in keys)
        seen = jnp.ones((1, q_low.slots.shape[1], k_low.slots.shape[2]), bool)
        if k_low.segments is not None:
            seen = (q_low.segments <= k_high.segments) & (k_low.segments <= q_high.segments) | (k_low.segments < 0)
        if self.causal:
            seen &= k_low.slots <= q_high.slots
        if self.window:
            close = q_low.positions - k_high.positions < self.window
            close = close if self.causal else close & (k_low.positions - q_high.positions < self.window)
            close = close if k_low.segments is None else close | (k_low.segments <= PREFIX_SEGMENT)
            seen &= close if self.local is None else close | ~self.local
        if self.prompt_sees_all and k_low.segments is not None:
            seen |= (q_low.segments <= PROMPT_SEGMENT) & (k_high.segments > 0)
        return seen
