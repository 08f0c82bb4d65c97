"""The description of one form in PEFT's format: its tensors and its JSON keys.

Torch stores `[out, in]` where leaves are `[in, out]`, so a matrix is transposed; also for GPT-2's Conv1D, whose
adapters are stored as those of any other layer. Layers of a stack with smaller ranks are padded with zeros in leaves,
and not in files.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank.core.typing import HostArrays
from lowrank.core.weight import Weight

Settings = Mapping[str, Any]


class Layer(NamedTuple):
    """One adapted module: its settings from the JSON, and its arrays by field, in the layout of leaves."""

    settings: Settings
    arrays: HostArrays


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an adapted module: its name after the module's path, our field, and its shape on disk.

    A shape of None: a module with these settings lacks the tensor, and the field is None.
    """

    suffix: str
    field: str
    shape: Callable[[int, int, Settings], tuple[int, ...] | None]  # (in, out, settings) -> shape
    vector: bool = False  # the field is one-dimensional
    embedding: str = ""  # the suffix on an embedding, if the form adapts embeddings

    def to_disk(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An array of a field in torch's layout."""
        return array.T.reshape(shape)

    def from_disk(self, array: np.ndarray) -> np.ndarray:
        """A stored array in the layout of the field."""
        return array.reshape(-1) if self.vector else array.T


@dataclasses.dataclass(frozen=True)
class Root:
    """The tensors at the root of an adapter, which all its modules share."""

    # (JSON, (in, out) of each adapted module) -> shape on disk by key
    shapes: Callable[[Mapping[str, Any], Sequence[tuple[int, int]]], dict[str, tuple[int, ...]]]
    # (JSON, the same sizes, all tensors of the file) -> root tensors by key
    read: Callable[[Mapping[str, Any], Sequence[tuple[int, int]], Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    # (root tensors, in, out) -> a module's further arrays
    module_arrays: Callable[[Mapping[str, np.ndarray], int, int], HostArrays]
    collect: Callable[[Sequence[Weight]], dict[str, Any]]  # (adapted weights) -> array by key, as on disk


@dataclasses.dataclass(frozen=True)
class PeftForm:
    """One form of weight in PEFT's format."""

    peft_type: str
    kind: type[Weight]
    parts: tuple[Part, ...]
    flags: Mapping[str, Any]  # JSON values that distinguish the forms of one peft_type
    obeyed_keys: Mapping[str, Any]  # JSON keys with an effect, and PEFT's defaults
    ignored_keys: tuple[str, ...]  # JSON keys without effect on the adapter's outputs
    supported: Mapping[str, tuple[Any, ...]]  # JSON keys that change the outputs -> supported values
    settings: Callable[[Mapping[str, Any], str], Settings]  # (JSON, path) -> the module's settings
    to_layer: Callable[[Weight, HostArrays], Layer | None]  # (weight, one layer of its arrays) -> None: not adapted
    from_layers: Callable[[Any, Sequence[Layer | None]], Weight]  # (base weight, one entry per layer) -> the form
    # (settings of each adapted path, the other paths, the method's settings) -> JSON
    summary: Callable[[Mapping[str, Settings], Sequence[str], Settings], dict[str, Any]]
    extra: tuple[str, ...] = ()  # fields that `to_layer` needs in addition to the parts'
    rebase: Callable[[Layer, np.ndarray], Layer] | None = None  # (layer, base - original) -> on the original base
    root: Root | None = None
    pad_ranks: Callable[[dict[str, Layer]], dict[str, Layer]] | None = None  # {path: layer} -> all with one rank
    # (adapted weights by name, the leaves under `shared/`) -> the weights with what they share in their own fields
    bind: Callable[[Mapping[str, Weight], Any], dict[str, Weight]] | None = None
    conv1d: bool = True  # whether PEFT supports it on GPT-2's Conv1D

    @property
    def on_embedding(self) -> bool:
        """Whether PEFT has the form on an embedding."""
        return all(part.embedding for part in self.parts)

    def present_parts(self, n_in: int, n_out: int, settings: Settings) -> tuple[tuple[Part, tuple[int, ...]], ...]:
        """The tensors of a module `[in, out]`, each with its shape on disk."""
        shapes = ((part, part.shape(n_in, n_out, settings)) for part in self.parts)
        return tuple((part, shape) for part, shape in shapes if shape is not None)

    @property
    def own_bias(self) -> str:
        """The mode of `bias` that stands for the biases of the adapted modules."""
        return f"{self.peft_type.lower()}_only"


WHERE = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}  # keys of every form
