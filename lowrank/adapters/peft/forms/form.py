"""How one form is said in PEFT's format.

Torch stores `[out, in]` where we keep `[in, out]`, so a matrix is transposed on its way; also for GPT-2's Conv1D, whose
adapters are stored as those of any other layer. Layers of a stack with smaller ranks are padded with zeros here and
stripped there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank.core.typing import HostArrays
from lowrank.core.weight import Weight

Settings = Mapping[str, Any]


class Layer(NamedTuple):
    """One adapted module: what the JSON says of it, and its arrays by field, in our layout."""

    settings: Settings
    arrays: HostArrays


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an adapted module: its name after the module's path, our field, and its shape on disk.

    A shape of None: a module with these settings has no such tensor, and our field is None.
    """

    suffix: str
    field: str
    shape: Callable[[int, int, Settings], tuple[int, ...] | None]  # of (in, out, settings)
    vector: bool = False  # ours is one-dimensional

    def to_disk(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our array as torch stores it."""
        return array.T.reshape(shape)

    def from_disk(self, array: np.ndarray) -> np.ndarray:
        """A stored array in our layout."""
        return array.reshape(-1) if self.vector else array.T


@dataclasses.dataclass(frozen=True)
class Root:
    """Tensors at the root of an adapter, which all its modules use."""

    # (JSON, (in, out) of each adapted module) -> shape on disk by key
    shapes: Callable[[Mapping[str, Any], Sequence[tuple[int, int]]], dict[str, tuple[int, ...]]]
    # (JSON, the same sizes, all tensors of the file) -> root tensors by key
    read: Callable[[Mapping[str, Any], Sequence[tuple[int, int]], Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    # (root tensors, in, out) -> a module's further arrays
    hand: Callable[[Mapping[str, np.ndarray], int, int], HostArrays]
    collect: Callable[[Sequence[Weight]], dict[str, Any]]  # (adapted weights) -> array by key, as on disk


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
    peel: Callable[[Weight, HostArrays], Layer | None]  # (weight, one layer of its arrays) -> None: not adapted
    grow: Callable[[Any, Sequence[Layer | None]], Weight]  # (base weight, one entry a layer) -> the form
    # (settings of each adapted path, the other paths, the method's settings) -> JSON
    summary: Callable[[Mapping[str, Settings], Sequence[str], Settings], dict[str, Any]]
    extra: tuple[str, ...] = ()  # fields that `peel` needs beside those of the parts
    rebase: Callable[[Layer, np.ndarray], Layer] | None = None  # (layer, base - original) -> on the original base
    root: Root | None = None
    level: Callable[[dict[str, Layer]], dict[str, Layer]] | None = None  # layers by path, once all are known
    # (adapted weights by name, the leaves under `shared/`) -> the weights with what they share in their own fields
    bind: Callable[[Mapping[str, Weight], Any], dict[str, Weight]] | None = None
    conv1d: bool = True  # whether PEFT has it on GPT-2's Conv1D

    def present(self, n_in: int, n_out: int, settings: Settings) -> tuple[tuple[Part, tuple[int, ...]], ...]:
        """The parts that a module `[in, out]` has, each with its shape on disk."""
        shapes = ((part, part.shape(n_in, n_out, settings)) for part in self.parts)
        return tuple((part, shape) for part, shape in shapes if shape is not None)

    @property
    def own_bias(self) -> str:
        """The mode of `bias` that says: the biases of the adapted modules."""
        return f"{self.peft_type.lower()}_only"


WHERE = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}  # what every form reads
