"""Checkpoints that are made of others: the first blocks of a model, and a model of random weights.

They are written once, as Hugging Face checkpoints under `runs/models/`, and named by their folders.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from lowrank import pretrained
from lowrank.core import tree
from lowrank.core.weight import name_key

FOLDER = Path("runs/models")


def first_blocks_folder(spec: str, layers: int) -> Path:
    """The folder of a model's first blocks, which `write_first_blocks` fills."""
    return FOLDER / f"{Path(spec).name}-first-{layers}"


def write_first_blocks(spec: str, layers: int) -> Path:
    """A checkpoint of the first `layers` blocks of a model, with its embeddings, last norm and head."""
    if not (folder := first_blocks_folder(spec, layers)).exists():
        base = pretrained.load(spec)
        params = {**base.params, "layers": jax.tree.map(lambda x: x[:layers], base.params["layers"])}
        config = dataclasses.replace(base.config, layers=layers)
        fewer = dataclasses.replace(base, config=config, hf_config={**base.hf_config, "num_hidden_layers": layers})
        pretrained.export(params, fewer, folder)
    return folder


def random_folder(spec: str) -> Path:
    """The folder of a model of random weights, which `write_random` fills."""
    return FOLDER / f"{Path(spec).name}-random"


def write_random(spec: str) -> Path:
    """A checkpoint of a model's shape: kernels and embeddings are normal (0.02), biases 0, and the norms' scales 1."""
    if not (folder := random_folder(spec)).exists():
        base = pretrained.load(spec)
        pretrained.export(tree.map_named(_random, base.params), base, folder)
    return folder


def _random(name: str, x: jax.Array) -> jax.Array:
    if name.endswith("norm/scale"):
        return jnp.ones_like(x)
    if name.endswith("bias"):
        return jnp.zeros_like(x)
    return 0.02 * jax.random.normal(name_key(jax.random.key(0), name), x.shape, x.dtype)
