"""Tiny models of the families whose fine-tunes become experts, from the tiny Llama's tensors. For tests."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support import tiny_checkpoint as tiny
from tests.support.merged_models import edit_config, fine_tune, tensors

ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def dense(folder: Path, family: str) -> Path:
    """Writes a model of a family; returns `folder`."""
    tiny.llama(folder)
    heads = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if family == "qwen2" else ()
    arrays = {n: x for n, x in tensors(folder).items() if not n.endswith("bias") or n.endswith(heads)}
    if family == "qwen3":
        norms = [f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(tiny.LAYERS) for n in "qk"]
        arrays |= {name: np.ones(tiny.WIDTH // tiny.HEADS, np.float32) for name in norms}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, model_type=family, architectures=[f"{ARCHITECTURES[family]}ForCausalLM"], attention_bias=False)
    return folder


def tuned(folder: Path, family: str, names: str = "ab") -> dict[str, Path]:
    """`{"base": ..., "a": ..., ...}`: a model of a family and fine-tunes of it."""
    base = dense(folder / "base", family)
    return {"base": base} | {name: fine_tune(base, folder / name, i + 1) for i, name in enumerate(names)}
