"""Tiny models to be merged: a base and its fine-tunes in folders, and what a merge of them holds. For tests."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from lowrank.merging.combine import combine
from lowrank.merging.recipe import parse_recipe
from tests.support import tiny_checkpoint as tiny


def fine_tune(base: Path, folder: Path, seed: int, size: float = 0.05, dtype=np.float32) -> Path:
    """A copy of a checkpoint with noise added to every tensor; returns `folder`."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(seed)
    arrays = load_file(base / "model.safetensors")
    noisy = {n: (x + size * rng.standard_normal(x.shape)).astype(dtype) for n, x in arrays.items()}
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


def family(folder: Path, count: int = 3) -> dict[str, Path]:
    """`{"base": ..., "a": ..., "b": ..., ...}`: a tiny Llama and `count` fine-tunes of it."""
    base = tiny.llama(folder / "base")
    return {"base": base} | {name: fine_tune(base, folder / name, i) for i, name in enumerate("abcdef"[:count])}


def recipe(models: dict[str, Path], /, **keys):
    """A recipe in which the names of `models` stand for their folders."""

    def placed(value):
        if isinstance(value, dict):
            return {k: placed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [placed(v) for v in value]
        return str(models[value]) if isinstance(value, str) and value in models else value

    return parse_recipe(yaml.safe_dump(placed(keys), sort_keys=False))


def merged(models: dict[str, Path], output: Path, /, **keys) -> dict[str, np.ndarray]:
    """The tensors of a merge."""
    combine(recipe(models, **keys), output)
    return load_file(output / "model.safetensors")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    return load_file(folder / "model.safetensors")


def edit_config(folder: Path, **keys) -> None:
    """Changes keys of a config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


BFLOAT16 = ml_dtypes.bfloat16
