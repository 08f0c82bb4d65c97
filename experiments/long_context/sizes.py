"""The sizes of the study, and the ways to a longer context that each compares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import unknown


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to a longer context: a key of `lowrank.models.context.STRETCHES`, or none, and whether it is tuned.

    Without one, positions go on beyond the base's as they are.
    """

    rope: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        """The row of the table."""
        return f"{self.rope or 'none'}{', tuned' if self.tuned else ''}"

    @property
    def file(self) -> str:
        """The name of its folder and of its scores."""
        return f"{self.rope or 'none'}{'-tuned' if self.tuned else ''}"

    def options(self, size: "Size") -> Mapping[str, Any]:
        """The options of the model's config."""
        return {"context": size.longest, "rope": self.rope} if self.rope else {"max_positions": size.longest}


WAYS = (
    Way(),
    Way("linear"),
    Way("ntk"),
    Way("yarn"),
    Way("linear", tuned=True),
    Way("yarn", tuned=True),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study: a decoder, its training on `length` tokens, and its extension to `longest`."""

    steps: int
    tuning_steps: int
    keys: int  # prompts with pass keys to train on
    length: int = 512
    longest: int = 2048
    shortest: int = 128  # tokens of a prompt in training
    vocab: int = 1024
    layers: int = 4
    width: int = 128
    hidden: int = 256
    heads: int = 4
    batch: int = 4
    rate: float = 3e-3
    tuning_batch: int = 2
    tuning_rate: float = 3e-4
    samples: int = 4  # prompts of each length and depth
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: int = 16  # rows of held-out text for perplexity
    bins: int = 16  # of the positions up to `longest`
    ways: tuple[Way, ...] = WAYS

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of the prompts that are scored: half of the base's context, all of it, and twice as many on."""
        found = [self.length // 2]
        while found[-1] < self.longest:
            found.append(2 * found[-1])
        return tuple(found)


SIZES = {
    "ci": Size(
        steps=2,
        tuning_steps=1,
        keys=16,
        length=288,
        longest=576,
        vocab=512,
        layers=1,
        width=16,
        hidden=16,
        heads=2,
        batch=2,
        samples=1,
        depths=(0.0, 1.0),
        rows=2,
        bins=4,
        ways=(Way(), Way("yarn"), Way("yarn", tuned=True)),
    ),
    "small": Size(steps=320, tuning_steps=12, keys=2400),
}


def get_size(name: str) -> Size:
    """The size of a name. Raises UserError for another one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]
