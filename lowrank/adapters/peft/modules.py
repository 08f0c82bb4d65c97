"""The modules of a base by their torch names, and the leaf that each of their tensors belongs to."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank.adapters.peft.forms import Part, PeftForm
from lowrank.adapters.peft.tensors import PREFIX
from lowrank.core.errors import UserError
from lowrank.models import EncoderConfig
from lowrank.pretrained.families import FAMILIES

HEADS = ("classifier", "score", "lm_head")  # `all-linear` leaves these out
TABLE = "embed/embedding"


class Base(Protocol):
    """The base model of an adapter; `lowrank.pretrained.Pretrained` is one."""

    @property
    def config(self) -> Any:
        """The model's config."""

    @property
    def family(self) -> str:
        """A key of `lowrank.pretrained.families.FAMILIES`."""
        ...

    @property
    def name(self) -> str:
        """The name that adapters record."""
        ...


class Place(NamedTuple):
    """The leaf, or one layer of a leaf, that a torch tensor belongs to; the layers of a stack are numbered in order."""

    leaf: str
    layer: int | None
    transpose: bool


class Module(NamedTuple):
    """A torch module with a weight, a bias or both."""

    path: str
    weight: Place | None
    bias: Place | None

    def places(self) -> dict[str, Place]:
        """The places of its tensors by torch's names, `weight` and `bias`."""
        return {kind: place for kind, place in (("weight", self.weight), ("bias", self.bias)) if place}

    @property
    def linear(self) -> bool:
        """Whether it is a Linear, or GPT-2's Conv1D."""
        return self.weight is not None and self.weight.leaf.endswith("kernel")

    @property
    def embedding(self) -> bool:
        """Whether it is the token embedding."""
        return self.weight is not None and self.weight.leaf == TABLE

    def takes(self, form: PeftForm) -> bool:
        """Whether the form may adapt it."""
        return self.linear or (self.embedding and form.on_embedding)

    def key(self, part: Part) -> str:
        """The key of a part of its adapter."""
        return f"{PREFIX}{self.path}{part.embedding if self.embedding else part.suffix}"


def base_modules(base: Base, per_expert: bool = False) -> dict[str, Module]:
    """The modules of `base` that hold a weight or a bias, by path.

    A bare encoder is the inner model of transformers, whose paths lack the family's prefix. With `per_expert`, each
    expert has modules of its own, as in transformers 4; the number of its layer counts all experts of all layers.
    """
    bare = isinstance(base.config, EncoderConfig) and not base.config.num_labels
    prefix = FAMILIES[base.family].prefix if bare else ""
    found: dict[str, dict[str, Place]] = {}
    for name, place in _places(base, per_expert):
        path, _, kind = name.removeprefix(prefix).rpartition(".")
        found.setdefault(path, {})[kind] = place
    return {path: Module(path, kinds.get("weight"), kinds.get("bias")) for path, kinds in found.items()}


def check_conv1d(form: PeftForm, module: Module) -> None:
    """Raises UserError for a form on GPT-2's Conv1D that PEFT supports on Linear layers only."""
    if not (form.conv1d or module.weight.transpose or module.embedding):
        raise UserError(f"{module.path} is a Conv1D, on which PEFT does not support {form.peft_type}")


def check_untied(base: Base, places: Iterable[Place]) -> None:
    """Raises UserError for a saved embedding whose base shares it with the head: PEFT would untie them."""
    if getattr(base.config, "tied", False) and any(place.leaf == TABLE for place in places):
        raise UserError("the adapter holds a whole embedding, which this base shares with its head: PEFT unties them")


def _places(base: Base, per_expert: bool) -> Iterator[tuple[str, Place]]:
    for tensor in FAMILIES[base.family].tensors(base.config):
        if per_expert or not tensor.experts:  # from transformers 5 on, experts are parameters of one module
            for place, name in zip(tensor.places, tensor.names, strict=True):
                layer = int(np.ravel_multi_index(place, tensor.stack)) if tensor.count else None
                yield name, Place(tensor.leaf, layer, tensor.transpose)
