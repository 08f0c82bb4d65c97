"""The modules of a base as torch names them, and the leaf of ours that each of their tensors is."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from lowrank.adapters.peft.forms import Form
from lowrank.core.errors import UserError
from lowrank.models import EncoderConfig
from lowrank.pretrained.families import FAMILIES

HEADS = ("classifier", "score", "lm_head")  # what `all-linear` leaves out


class Base(Protocol):
    """What an adapter is for; `lowrank.pretrained.Pretrained` is one."""

    config: Any
    family: str
    name: str


class Place(NamedTuple):
    """Where one torch tensor lives: a leaf, or one layer of it."""

    leaf: str
    layer: int | None
    transpose: bool


class Module(NamedTuple):
    """A torch module, by what it holds."""

    path: str
    weight: Place | None
    bias: Place | None

    def places(self) -> dict[str, Place]:
        """What it holds, by torch's name."""
        return {kind: place for kind, place in (("weight", self.weight), ("bias", self.bias)) if place}

    @property
    def linear(self) -> bool:
        """Whether it is a Linear, or GPT-2's Conv1D."""
        return self.weight is not None and self.weight.leaf.endswith("kernel")


def modules(base: Base) -> dict[str, Module]:
    """The modules of `base` that hold a weight or a bias, by path.

    A bare encoder is the inner model of transformers, whose paths lack the family's prefix.
    """
    bare = isinstance(base.config, EncoderConfig) and not base.config.num_labels
    prefix = FAMILIES[base.family].prefix if bare else ""
    found: dict[str, dict[str, Place]] = {}
    for name, place in _places(base):
        path, _, kind = name.removeprefix(prefix).rpartition(".")
        found.setdefault(path, {})[kind] = place
    return {path: Module(path, kinds.get("weight"), kinds.get("bias")) for path, kinds in found.items()}


def check_conv1d(form: Form, module: Module) -> None:
    """Raises UserError for a form on GPT-2's Conv1D that PEFT has on Linear layers only."""
    if not (form.conv1d or module.weight.transpose):
        raise UserError(f"{module.path} is a Conv1D, on which PEFT has no {form.peft_type}")


def check_untied(base: Base, places: Iterable[Place]) -> None:
    """Raises UserError for an embedding of its own where the head shares the base's: PEFT would untie them."""
    if getattr(base.config, "tied", False) and any(place.leaf == "embed/embedding" for place in places):
        raise UserError("the adapter holds a whole embedding, which this base shares with its head: PEFT unties them")


def _places(base: Base) -> Iterator[tuple[str, Place]]:
    for tensor in FAMILIES[base.family].tensors(base.config):
        if not tensor.experts:  # in torch they are parameters of one module, not modules
            for i, name in enumerate(tensor.names):
                yield name, Place(tensor.leaf, i if tensor.count else None, tensor.transpose)
