"""Rows for tests of attention: the masks that models make of them, and attention one query at a time in float64."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.models import attention_masks
from lowrank.models.positions import LayerKind

HEAD = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of tokens by their segments (0: padding), and the options of the model that reads them."""

    segments: tuple[tuple[int, ...], ...] | int  # an int: one row of that length without segments
    heads: tuple[int, int] = (4, 2)
    window: int = 0
    local: bool | None = None  # a layer of a stack of both kinds
    cap: float = 0.0
    prefix: int = 0
    prompt: int = 0
    bidirectional: bool = False

    @property
    def length(self) -> int:
        """The number of tokens, without virtual ones."""
        return self.segments if isinstance(self.segments, int) else len(self.segments[0])


PACKED = ((1,) * 9 + (2,) * 4 + (3,) * 6 + (0,) * 2, (1,) * 21)
PADDED = ((0,) * 8 + (1,) * 13, (1,) * 21)
CASES = {
    "length 1": Case(1),
    "causal": Case(21, heads=(4, 1)),
    "window": Case(21, window=5, heads=(2, 2)),
    "every token": Case(13, bidirectional=True),
    "packed": Case(PACKED),
    "packed, batch 1": Case(PACKED[:1], heads=(3, 1)),
    "packed, window, cap": Case(PACKED, window=4, cap=2.0),
    "left padding, cap": Case(PADDED, cap=2.0),
    "global of a mixed stack": Case(PACKED, window=4, local=False),
    "local of a mixed stack": Case(PACKED, window=4, local=True, cap=2.0),
    "prefix, packed, window": Case(PACKED, prefix=5, window=4),
    "prefix, no segments": Case(9, prefix=3),
    "virtual tokens, window": Case(PADDED, prompt=10, window=12),
    "both directions": Case(PADDED, bidirectional=True),
    "both directions, window": Case(PADDED, bidirectional=True, window=5),
    "both directions, virtual tokens, prefix": Case(PADDED, bidirectional=True, prompt=3, prefix=2),
}


def mask_of(case: Case) -> Any:
    """The mask that the models make of a case."""
    rows = None if isinstance(case.segments, int) else jnp.asarray(case.segments, jnp.int32)
    config = SimpleNamespace(
        window=case.window,
        needs_mask=case.local is not None or case.cap > 0 or case.prefix > 0,
        prefix_length=case.prefix,
        num_virtual_tokens=case.prefix + case.prompt,
        num_prompt=case.prompt,
        ropes=(None,),
    )
    if case.bidirectional:
        return attention_masks.bidirectional_inputs(config, rows, case.length + case.prompt)[1].mask
    inputs = attention_masks.causal_inputs(config, case.length + case.prompt, case.prompt, None, rows)[1]
    return inputs.mask if case.local is None else inputs.of_layer(LayerKind(local=jnp.bool_(case.local))).mask


def seen(case: Case) -> np.ndarray:
    """`[B, T, S]` bools: the keys that each query of a case sees, pair by pair."""
    rows = ((1,) * case.segments,) if isinstance(case.segments, int) else case.segments
    window = case.window if case.local in (None, True) else 0
    return np.array([_row_seen(case, row, window) for row in rows])


def _row_seen(case: Case, row: tuple[int, ...], window: int) -> list[list[bool]]:
    virtual = case.prefix + case.prompt
    segments = [None] * virtual + list(row)
    counts = [segments[virtual:i].count(s) for i, s in enumerate(segments)]
    places = [i if s is None else virtual + n for i, (s, n) in enumerate(zip(segments, counts, strict=True))]

    def sees(t: int, s: int) -> bool:
        if s < case.prefix:
            return True
        if case.bidirectional and segments[t] is None and segments[s]:
            return True
        same = segments[s] is None or segments[s] == segments[t]
        distance = places[t] - places[s]
        near = not window or (abs(distance) if case.bidirectional else distance) < window
        return same and near and (case.bidirectional or s <= t)

    return [[sees(t, s) for s in range(len(segments))] for t in range(case.prefix, len(segments))]


def reference(q: Any, k: Any, v: Any, g: Any, see: np.ndarray, scale: float, cap: float) -> list[np.ndarray]:
    """The output, and the gradients of `sum(g * output)` by q, k and v, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, n, t in np.ndindex(*(q.shape[i] for i in (0, 2, 1))):
        keys, head = np.flatnonzero(see[b % len(see), t]), n // (q.shape[2] // k.shape[2])
        raw = k[b, keys, head] @ q[b, t, n] * scale
        s = cap * np.tanh(raw / cap) if cap else raw
        p = np.exp(s - s.max())
        p /= p.sum()
        out[b, t, n] = p @ v[b, keys, head]
        ds = p * (v[b, keys, head] @ g[b, t, n] - out[b, t, n] @ g[b, t, n]) * scale
        ds = ds * (1 - (s / cap) ** 2) if cap else ds
        dq[b, t, n] = ds @ k[b, keys, head]
        dk[b, keys, head] += ds[:, None] * q[b, t, n]
        dv[b, keys, head] += p[:, None] * g[b, t, n]
    return [out, dq, dk, dv]
