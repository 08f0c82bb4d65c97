"""A Hugging Face directory: its config, its tokenizer, and its tensors under the names of today."""

from collections.abc import Sequence
from pathlib import Path

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import ModelConfig
from lowrank.pretrained import fp8, hf_files, tokenizer, wrapped_models
from lowrank.pretrained.families import Family, family_of
from lowrank.pretrained.fused_experts import split_fused_experts
from lowrank.pretrained.size_limits import check_sizes
from lowrank.pretrained.tensor_reader import StoredTensor
from lowrank.pretrained.tokenizer import Tokenizer


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
