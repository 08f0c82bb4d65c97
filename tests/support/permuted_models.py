"""Copies of tiny checkpoints with units, heads and dimensions in another order, which compute the same. For tests."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support import tiny_checkpoint as tiny
from tests.support.merged_models import tensors

HEAD = tiny.WIDTH // tiny.HEADS


def _copy(source: Path, folder: Path, arrays: dict) -> Path:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def llama(source: Path, folder: Path, seed: int = 0, residual: bool = False) -> Path:
    """A Llama in another order of units, groups, query heads in each and value dimensions; returns `folder`."""
    rng, x = np.random.default_rng(seed), tensors(source)
    K, G = tiny.KV_HEADS, tiny.HEADS // tiny.KV_HEADS
    for i in range(tiny.LAYERS):
        mlp, attn = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
        units = rng.permutation(tiny.HIDDEN)
        for name in ("gate", "up"):
            x[f"{mlp}.{name}_proj.weight"] = x[f"{mlp}.{name}_proj.weight"][units]
        x[f"{mlp}.down_proj.weight"] = x[f"{mlp}.down_proj.weight"][:, units]
        groups = rng.permutation(K)
        heads = [rng.permutation(G) for _ in range(K)]
        values = [rng.permutation(HEAD) for _ in range(K)]
        queries = [
            (g * G + h) * HEAD + d for g, order in zip(groups, heads, strict=True) for h in order for d in range(HEAD)
        ]
        keys = [g * HEAD + d for g in groups for d in range(HEAD)]
        of_v = [g * HEAD + d for g, order in zip(groups, values, strict=True) for d in order]
        outputs = [
            (g * G + h) * HEAD + d
            for g, order, dims in zip(groups, heads, values, strict=True)
            for h in order
            for d in dims
        ]
        for name, order in (("q", queries), ("k", keys), ("v", of_v)):
            for kind in ("weight", "bias"):
                x[f"{attn}.{name}_proj.{kind}"] = x[f"{attn}.{name}_proj.{kind}"][order]
        x[f"{attn}.o_proj.weight"] = x[f"{attn}.o_proj.weight"][:, outputs]
    if residual:
        stream = rng.permutation(tiny.WIDTH)
        for name, values in x.items():
            axis = 0 if "norm" in name or "o_proj" in name or "down_proj" in name else values.ndim - 1
            if not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                x[name] = np.take(values, stream, axis)
    return _copy(source, folder, x)


def bert(source: Path, folder: Path, seed: int = 0) -> Path:
    """A BERT in another order of units, heads, and dimensions of queries with keys and of values; returns `folder`."""
    rng, x = np.random.default_rng(seed), tensors(source)
    for i in range(tiny.LAYERS):
        layer = f"encoder.layer.{i}"
        units, heads = rng.permutation(tiny.HIDDEN), rng.permutation(tiny.HEADS)
        of_qk, of_v = (np.concatenate([h * HEAD + rng.permutation(HEAD) for h in heads]) for _ in range(2))
        orders = {"intermediate.dense": units, "attention.self.query": of_qk, "attention.self.key": of_qk}
        for name, order in (orders | {"attention.self.value": of_v}).items():
            for kind in ("weight", "bias"):
                x[f"{layer}.{name}.{kind}"] = x[f"{layer}.{name}.{kind}"][order]
        for name, order in (("output.dense", units), ("attention.output.dense", of_v)):
            x[f"{layer}.{name}.weight"] = x[f"{layer}.{name}.weight"][:, order]
    return _copy(source, folder, x)
