"""How one form is said in PEFT's format.

Torch stores `[out, in]` where we keep `[in, out]`, so a matrix is transposed on its way; also for GPT-2's Conv1D, whose
adapters are stored as those of any other layer. Layers of a stack with smaller ranks are padded with zeros here and
stripped there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank.weight import Weight

Settings = Mapping[str, Any]
Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """One adapted module: what the JSON says of it, and its arrays by field, in our layout."""

    settings: Settings
    arrays: Arrays


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an adapted module: its name after the module's path, our field, and its shape on disk."""

    suffix: str
    field: str
    shape: Callable[[int, int, Settings], tuple[int, ...]]  # of (in, out, settings)
    vector: bool = False  # ours is one-dimensional

    def to_disk(self, array: np.ndarray, n_in: int, n_out: int, settings: Settings) -> np.ndarray:
        """Our array as torch stores it."""
        return array.T.reshape(self.shape(n_in, n_out, settings))

    def from_disk(self, array: np.ndarray) -> np.ndarray:
        """A stored array in our layout."""
        return array.reshape(-1) if self.vector else array.T


@dataclasses.dataclass(frozen=True)
class Form:
    """How one kind of weight is said in PEFT's format."""

    peft_type: str
    kind: type[Weight]
    parts: tuple[Part, ...]
    flags: Mapping[str, Any]  # JSON values that tell the forms of one peft_type apart
    reads: Mapping[str, Any]  # JSON keys that are obeyed, with PEFT's defaults
    ignores: tuple[str, ...]  # JSON keys without effect on what the adapter computes
    only: Mapping[str, tuple[Any, ...]]  # JSON keys that change the maths, with the values that are understood
    settings: Callable[[Mapping[str, Any], str], Settings]  # (JSON, path) -> of that module
    peel: Callable[[Weight, Arrays], Layer | None]  # (weight, one layer of its arrays) -> None: not adapted
    grow: Callable[[Any, Sequence[Layer | None]], Weight]  # (base weight, one entry a layer) -> the form
    # (settings of each adapted path, the other paths, the method's settings) -> JSON
    summary: Callable[[Mapping[str, Settings], Sequence[str], Settings], dict[str, Any]]
    extra: tuple[str, ...] = ()  # fields that `peel` needs beside those of the parts
    rebase: Callable[[Layer, np.ndarray], Layer] | None = None  # (layer, base - original) -> on the original base


WHERE = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}  # what every form reads
