"""The models of the study: a decoder trained here from random weights, and its extensions to a longer context.

Each is a run of `lowrank.training` in a folder of its own, which the same command continues.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.long_context import texts
from experiments.long_context.sizes import Size, Way
from lowrank import models, pretrained
from lowrank.adapters import load
from lowrank.core import tree
from lowrank.core.weight import name_key
from lowrank.pretrained import Pretrained
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.tokenizer import load_tokenizer
from lowrank.training import loop

SHARE = 0.6  # of the tokens are prompts with pass keys
ANSWERS = 0.3  # the weight of a prompt's tokens, where those of its pass key weigh 1


def write_random(size: Size, folder: Path) -> Path:
    """The checkpoint of a Llama of random weights, with the study's tokenizer; written if it is missing."""
    if (path := folder / "random").exists():
        return path
    texts.write_tokenizer(folder / "tokenizer", size.vocab)
    config = {
        "model_type": "llama",
        "vocab_size": size.vocab,
        "hidden_size": size.width,
        "intermediate_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": size.length,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    ours = FAMILIES["llama"].config(config)
    network = models.build_model(ours)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    base = Pretrained(ours, None, load_tokenizer(folder / "tokenizer", config), "llama", str(path), config)
    return pretrained.export(tree.map_named(_random, shapes), base, path)


def _random(name: str, x: jax.Array) -> jax.Array:
    if name.endswith("scale"):
        return jnp.ones(x.shape, x.dtype)
    return 0.02 * jax.random.normal(name_key(jax.random.key(0), name), x.shape, x.dtype)


def write_data(size: Size, folder: Path, tokenizer: Any) -> None:
    """The records of both lengths: those of the base, and those with which extensions are tuned."""
    for length in (size.length, size.longest):
        if not (folder / f"data-{length}" / "texts").exists():
            count = size.keys * size.length // length
            texts.write_records(folder / f"data-{length}", tokenizer, (size.shortest, length - 2), count)


def train_base(size: Size, folder: Path) -> Path:
    """The checkpoint of the base, trained on `size.length` tokens; trained if it is missing."""
    if (path := folder / "base").exists():
        return path
    random = write_random(size, folder)
    model = {"name": str(random), "remat": "none"}
    found = _trained(size, folder, folder / "train", model, size.length, size.steps, size.rate, size.batch)
    pretrained.export(found.params, found, path)
    return path


def extended(size: Size, folder: Path, way: Way) -> Pretrained:
    """The base with a context of `size.longest` tokens, tuned in it where the way says so."""
    options = way.options(size)
    base = train_base(size, folder)
    if not way.tuned:
        return pretrained.load(str(base), model=options)
    model = {"name": str(base), "remat": "full", **options}
    return _trained(
        size, folder, folder / way.file, model, size.longest, size.tuning_steps, size.tuning_rate, size.tuning_batch
    )


def _trained(
    size: Size, folder: Path, run: Path, model: Mapping[str, Any], length: int, steps: int, rate: float, batch: int
) -> Pretrained:
    """A run of all parameters on texts and prompts of up to `length` tokens."""
    data = folder / f"data-{length}"
    config = {
        "steps": steps,
        "model": dict(model),
        "method": {"name": "full"},
        "data": {
            "source": f"{SHARE} * jsonl:{data / 'keys'} + {1 - SHARE:g} * jsonl:{data / 'texts'}",
            "seq_len": length,
            "batch_size": batch,
            "prompt_loss_weight": ANSWERS,
        },
        "optim": {"lr": rate, "warmup": max(1, steps // 20), "schedule": "cosine", "final": 0.1, "weight_decay": 0.01},
        "mesh": {"data": 1},
        "checkpoint": {"every": max(1, steps // 10), "keep": 1},
        "log_every": max(1, steps // 50),
    }
    loop.run(config, run)
    options = {k: v for k, v in model.items() if k != "name"}
    return load.load_adapted(run / loop.ADAPTER, model["name"], model=options)
