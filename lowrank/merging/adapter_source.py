"""The update that an adapter makes to each kernel of a base: its true change, and its factors where it has any.

A DoRA, an (IA)^3, a VeRA, a LoHa, a LoKr or an OFT is not a LoRA: its update is what its form makes of the base's
kernel, minus that kernel.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters import export
from lowrank.adapters.peft import config as peft_config
from lowrank.adapters.peft import match, reading
from lowrank.adapters.peft import tensors as peft_tensors
from lowrank.adapters.peft.forms import Layer, PeftForm, Settings
from lowrank.adapters.peft.modules import HEADS, Module, base_modules
from lowrank.core.errors import UserError, nearest
from lowrank.core.weight import Weight
from lowrank.merging.checkpoint import Change, Checkpoint
from lowrank.merging.factors import Factors
from lowrank.merging.model_spec import ModelSpec
from lowrank.pretrained import hf_files
from lowrank.weights.adalora import AdaLoRA
from lowrank.weights.lora import RESIDUAL, LoRA

# What an adapter may train beside its kernels, which a merge of updates cannot carry.
EXTRAS = ("modules_to_save", "trainable_token_indices", "target_parameters")
_Split = Callable[[Any], tuple[Any, Any]]
FACTORS: dict[type[Weight], _Split] = {
    LoRA: lambda w: (w.a, w.scale * np.asarray(w.b, np.float64)),
    AdaLoRA: lambda w: (w.a, w.scale * np.asarray(w.e, np.float64)[:, None] * np.asarray(w.b, np.float64)),
}


class BaseModel(NamedTuple):
    """A base as `lowrank.adapters.peft` needs it."""

    config: Any
    family: str
    name: str


class AdapterSource:
    """A PEFT adapter of a base. `paths` are the modules that it adapts; its tensors are read, the base's are not."""

    def __init__(self, directory: str, checkpoint: Checkpoint):
        """Raises UserError for an adapter that trains more than kernels, and for one of another base."""
        raw = peft_config.parse_json(directory)
        if raw["peft_type"] in peft_config.WHOLE_MODEL:
            raise UserError(
                f"{directory} is a {raw['peft_type']} adapter, which changes no kernel: it cannot be merged"
            )
        self.directory, self.checkpoint = directory, checkpoint
        self.settings, self.form = peft_config.read_config(directory)
        for key in EXTRAS:
            if self.settings.get(key):
                raise UserError(f"the adapter in {directory} has {key}, which a merge of updates cannot carry")
        if self.settings.get("bias", "none") != "none":
            raise UserError(f"the adapter in {directory} trains biases, which a merge of updates cannot carry")
        self.base = base_model(checkpoint)
        check_base(self.settings, directory, checkpoint)
        self.modules = _targets(self.settings, self.form, base_modules(self.base))
        if checkpoint.tied and self.embedding and self.settings.get("ensure_weight_tying"):
            raise UserError(
                f"the adapter in {directory} adapts the head of {checkpoint.spec} as its embedding, which a merge of "
                "updates cannot carry: merge it by launch.merge, and then the models"
            )
        self.paths = list(self.modules)
        self._found = peft_tensors.read_tensors(directory)
        self._sizes = {path: self.kernel_shape(path) for path in self.paths}
        self._check_tensors()

    @property
    def embedding(self) -> str | None:
        """The path of the token embedding, if the adapter adapts it."""
        return next((path for path, module in self.modules.items() if module.embedding), None)

    def kernel_shape(self, path: str) -> tuple[int, int]:
        """`(in, out)` of a module. Raises UserError for a module that the base lacks."""
        name = tensor_name(path, self.checkpoint)
        n_out, n_in = self.checkpoint.tensors[name].shape
        return (n_in, n_out) if self.is_flipped(path) else (n_out, n_in)

    def is_flipped(self, path: str) -> bool:
        """Whether the weight of a module is stored `[out, in]`."""
        weight = self.modules[path].weight
        assert weight is not None
        return weight.transpose

    def _check_tensors(self) -> None:
        root, sizes = self.form.root, list(self._sizes.values())
        expected = root.shapes(self.settings, sizes) if root else {}
        for path, size in self._sizes.items():
            for part, shape in self.form.present_parts(*size, self._settings_of(path)):
                expected[self.modules[path].key(part)] = shape
        peft_tensors.check_shapes(self.directory, self._found, expected)
        self._root: Mapping[str, np.ndarray] = root.read(self.settings, sizes, self._found) if root else {}

    def _settings_of(self, path: str) -> Settings:
        return self.form.settings(reading.on_module(self.settings, self.modules[path]), path)

    def weight(self, path: str, kernel: Any) -> Weight:
        """The adapter's form on a kernel `[in, out]`, or on the shape of one."""
        settings, size = self._settings_of(path), self._sizes[path]
        arrays = self.form.root.module_arrays(self._root, *size) if self.form.root else {}
        for part, _ in self.form.present_parts(*size, settings):
            arrays[part.field] = part.from_disk(self._found[self.modules[path].key(part)])
        base = jnp.asarray(kernel, jnp.float32) if isinstance(kernel, np.ndarray) else kernel
        return self.form.from_layers(base, [Layer(settings, arrays)])

    @property
    def has_factors(self) -> bool:
        """Whether its updates have factors."""
        return self.form.kind in FACTORS

    @property
    def needs_kernel(self) -> bool:
        """Whether its updates depend on the base's kernels."""
        return not self.has_factors or self.settings.get("init_lora_weights") in RESIDUAL

    def factors(self, path: str, kernel: np.ndarray | None = None) -> Factors | None:
        """The factors of the update to a kernel `[in, out]`, which only some need; None for an update without any."""
        w = self.weight(path, jax.ShapeDtypeStruct(self._sizes[path], jnp.float32) if kernel is None else kernel)
        split = FACTORS.get(type(w))
        return Factors(*(np.asarray(x, np.float64) for x in split(w))) if split else None

    def delta(self, path: str, kernel: np.ndarray) -> np.ndarray:
        """The update to a kernel `[in, out]`, dense and in float64."""
        factors = self.factors(path, kernel)
        if factors:
            return factors.a @ factors.b
        before, after = export.exact_kernels(self.weight(path, kernel))
        return after - before


def base_model(checkpoint: Checkpoint) -> BaseModel:
    """The base of adapters. Raises UserError for a family that is not known."""
    config = hf_files.parse_config(str(checkpoint.folder), checkpoint.hf_config)
    return BaseModel(config, checkpoint.hf_config["model_type"], checkpoint.name)


def tensor_name(path: str, checkpoint: Checkpoint) -> str:
    """The name of a module's kernel in a checkpoint, which may be that of the bare model, without a prefix."""
    names = [name for name in checkpoint.tensors if name == f"{path}.weight" or name.endswith(f".{path}.weight")]
    bare = [name for name in checkpoint.tensors if path.endswith(f".{name.removesuffix('.weight')}")]
    if not (found := [*names, *bare]):
        raise UserError(f"{checkpoint.spec} lacks {path}, which the adapter targets{nearest(path, checkpoint.tensors)}")
    return min(found, key=len)


def _targets(settings: Mapping[str, Any], form: PeftForm, known: Mapping[str, Module]) -> dict[str, Module]:
    linear = [path for path, module in known.items() if module.linear]
    paths = linear if reading.is_all(settings["target_modules"]) else list(known)
    paths = match.find_targets(settings, paths, heads=[p for p in linear if p.split(".")[0] in HEADS])
    for path in paths:
        if not known[path].takes(form):
            kinds = "linear layers and the token embedding" if form.on_embedding else "linear layers"
            raise UserError(f"the adapter targets {path}, which a merge of updates cannot carry: it carries {kinds}")
    return {path: known[path] for path in paths}


def check_base(settings: Mapping[str, Any], directory: str, checkpoint: Checkpoint) -> None:
    """Raises UserError when the base that an adapter records has other weights than the checkpoint.

    A recorded base that lies on this machine is compared by the hash of its tensors, else by its name.
    """
    recorded = settings["base_model_name_or_path"]
    if recorded and Path(recorded).is_dir():
        other = Checkpoint(ModelSpec(recorded))
        if not same_weights(other, checkpoint):
            raise UserError(
                f"the adapter in {directory} was trained on {recorded}, whose weights are not those of "
                f"{checkpoint.folder}: their hashes differ"
            )
    else:
        peft_config.check_base(settings, checkpoint.name, directory, any_base=False)


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors, by their hash unless they are the same folder."""
    return one.folder.resolve() == other.folder.resolve() or one.fingerprint() == other.fingerprint()


def add_adapter(checkpoint: Checkpoint) -> Change:
    """What adds the adapter of a checkpoint's spec to its tensors."""
    source = AdapterSource(str(checkpoint.spec.adapter), checkpoint)
    paths = {tensor_name(path, checkpoint): path for path in source.paths}
    if checkpoint.tied and source.embedding:
        raise UserError(
            f"the adapter in {source.directory} adapts {source.embedding} and not the head of {checkpoint.spec}, which "
            "is its embedding: merge it by launch.merge, which stores a head of its own, and then the models"
        )

    def change(name: str, values: np.ndarray) -> np.ndarray:
        if name not in paths:
            return values
        flipped = source.is_flipped(paths[name])
        delta = source.delta(paths[name], values.T if flipped else values)
        values += delta.T if flipped else delta
        return values

    return change
