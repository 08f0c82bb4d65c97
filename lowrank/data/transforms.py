"""The transforms of documents: what a document becomes in an epoch. A new one is one file and one line in `TRANSFORMS`.

A transform is set by its group of `data`, such as `data.infill`, and its field of `DataConfig` has its name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.denoise import build_denoise
from lowrank.data.infill import build_infill


class Transform(Protocol):
    """Sequences of at most `room` tokens that become others, which fit into a row with what is added to them."""

    @property
    def room(self) -> int:
        """The most tokens of a sequence."""

    def check(self, sequence: Mapping[str, Any], where: str) -> None:
        """Raises UserError naming `where` for a text that holds what the transform adds."""

    def __call__(self, sequence: HostArrays, draw: Sequence[int]) -> HostArrays:
        """Another sequence; `draw` is the seed, the epoch, the record and the number of the sequence in it."""


TRANSFORMS: dict[str, Callable[[Mapping[str, Any], Tokenizer, int], Transform]] = {
    "denoise": build_denoise,
    "infill": build_infill,
}
NONE = dict.fromkeys(TRANSFORMS)  # the fields of a `DataConfig` whose documents are read from left to right


def name_of(config: DataConfig) -> str:
    """The name of the transform of a config, empty without one. Raises UserError for more than one."""
    names = [name for name in TRANSFORMS if getattr(config, name) is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(f'data.{name}' for name in names)} both change documents: leave one out")
    return "".join(names)


def build_transform(config: DataConfig, tokenizer: Tokenizer) -> Transform | None:
    """The transform of a config. Raises UserError for a wrong option, and for sentinels that the vocabulary lacks."""
    name = name_of(config)
    return TRANSFORMS[name](getattr(config, name), tokenizer, config.seq_len) if name else None
