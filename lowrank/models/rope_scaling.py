"""How rope is stretched for long contexts: a kind of scaling is one value of the table.

Shapes: B rows, F frequencies. `powers` are `theta ** (2 i / d)`, float32 `[F]`: the inverses of the frequencies.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError, plural, unknown


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A kind of scaling, a key of `KINDS`, and its numbers; each kind reads those that its `Kind` lists.

    `factor` is how many times longer the context is than `original_positions`, that of pre-training. Cosines and sines
    are multiplied by `attention_factor`, at every length; None: by that of the kind.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: float = 8192
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @property
    def of_cosines(self) -> float:
        """The factor of cosines and sines."""
        return KINDS[self.kind].attention(self) if self.attention_factor is None else self.attention_factor

    @property
    def positions(self) -> int:
        """The context in tokens that the numbers themselves tell; 0 where they tell none."""
        return round(self.factor * self.original_positions) if KINDS[self.kind].tells_context else 0


def _no_attention_factor(s: RopeScaling) -> float:
    del s
    return 1.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of scaling.

    `frequencies(powers, theta, scaling, length)` are the angles per position, `[F]`, or `[B, F]` if they depend on
    `length`, the tokens of each row, int32 `[B, 1]`. `fields` are the numbers that it reads, of which those of
    `optional` have defaults.
    """

    frequencies: Callable[[np.ndarray, float, RopeScaling, Any], Any]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    attention: Callable[[RopeScaling], float] = _no_attention_factor
    by_length: bool = False
    tells_context: bool = False  # whether the context is `factor * original_positions`


def _linear(powers: np.ndarray, theta: float, s: RopeScaling, length: Any) -> np.ndarray:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    del theta, length
    return 1 / powers / s.factor


def _dynamic(powers: np.ndarray, theta: float, s: RopeScaling, length: Any) -> Any:
    """NTK-aware scaling by the length of a row: up to the original positions, frequencies stay as they are."""
    del theta
    stretch = s.factor * jnp.maximum(length, s.original_positions) / s.original_positions - (s.factor - 1)
    d = 2 * len(powers)  # the base grows by stretch ** (d / (d - 2))
    return 1 / powers[None] * stretch ** -(np.arange(0, d, 2, dtype=np.float32) / (d - 2))[None]


def _yarn(powers: np.ndarray, theta: float, s: RopeScaling, length: Any) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with the ramp in the index of the frequency, as its authors code it.

    The paper has the ramp in the number of turns.
    """
    del length
    d = 2 * len(powers)

    def index(turns: float) -> float:
        """The index of the frequency that turns so often within the original context."""
        return d * math.log(s.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = (np.arange(len(powers), dtype=np.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - np.clip(ramp.astype(np.float32), 0, 1)
    return 1 / (np.float32(s.factor) * powers) * (1 - keep) + 1 / powers * keep


def _yarn_attention(s: RopeScaling) -> float:
    def grown(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(s.factor) + 1 if s.factor > 1 else 1.0

    return grown(s.mscale) / grown(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else grown(1.0)


def _llama3(powers: np.ndarray, theta: float, s: RopeScaling, length: Any) -> np.ndarray:
    """Frequencies with wavelengths above `original / low` are divided, those below `original / high` stay."""
    del theta, length
    f = 1 / powers
    turns = s.original_positions / (2 * math.pi / f)  # how often a pair turns within the original context
    keep = np.clip((turns - s.low) / (s.high - s.low), 0, 1)
    return keep * f + (1 - keep) * f / s.factor


def _longrope(powers: np.ndarray, theta: float, s: RopeScaling, length: Any) -> Any:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): factors of each frequency, others in rows beyond the original."""
    del theta
    short, long = (1 / (np.array(x, np.float32) * powers) for x in (s.short, s.long))
    return jnp.where(length > s.original_positions, long[None], short[None])


def _longrope_attention(s: RopeScaling) -> float:
    return math.sqrt(1 + math.log(s.factor) / math.log(s.original_positions)) if s.factor > 1 else 1.0


YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
KINDS: dict[str, Kind] = {
    "linear": Kind(_linear, ("factor",)),
    "dynamic": Kind(_dynamic, ("factor", "original_positions"), by_length=True, tells_context=True),
    "yarn": Kind(_yarn, ("factor", "original_positions", *YARN), YARN, _yarn_attention, tells_context=True),
    "llama3": Kind(_llama3, ("factor", "low", "high", "original_positions")),
    "longrope": Kind(
        _longrope,
        ("short", "long", "original_positions", "factor", "attention_factor"),
        ("factor", "attention_factor"),
        _longrope_attention,
        by_length=True,
    ),
}


def check_scaling(s: RopeScaling, width: int, theta: float) -> None:
    """Raises UserError for numbers with which rope cannot turn `width` dimensions of a head."""
    if s.kind not in KINDS:
        raise unknown("rope scaling", s.kind, KINDS)
    read = KINDS[s.kind].fields
    for name in ("short", "long") if "short" in read else ():
        factors = getattr(s, name)
        if len(factors) != width // 2:
            has = f"has {plural(len(factors), 'factor')} in its {name} list, and rope has {width // 2} frequencies"
            raise UserError(f"the rope scaling {s.kind!r} {has}: give one for each")
        if not all(0 < x < math.inf for x in factors):
            raise UserError(f"the rope scaling {s.kind!r} has a factor in its {name} list that is not above 0")
    wrong = {
        "a factor below 1": "factor" in read and not 1 <= s.factor < math.inf,
        "original positions below 2": "original_positions" in read and not 2 <= s.original_positions < math.inf,
        "a context beyond the positions of 32 bits": KINDS[s.kind].tells_context
        and not s.factor * s.original_positions < 2**31,
        f"a high frequency factor of {s.high}, not above the low one of {s.low}": "high" in read
        and not 0 < s.low < s.high,
        f"a beta_fast of {s.beta_fast}, below its beta_slow of {s.beta_slow}": "beta_fast" in read
        and not 0 < s.beta_slow <= s.beta_fast,
        f"an attention factor of {s.attention_factor}, not above 0": s.attention_factor is not None
        and not 0 < s.attention_factor < math.inf,
        f"a theta of {theta}, not above 1": s.kind == "yarn" and theta <= 1,
        "one frequency alone": s.kind == "dynamic" and width < 4,
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"the rope scaling {s.kind!r} has {what}: correct it")
