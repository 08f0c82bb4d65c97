"""A base before any tuning: its score, and the bits that its kernels take in memory and on disk."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from experiments.quantization.rows import BASES
from experiments.study.study import Row, Study
from experiments.study.tasks import Model, Task, embed_articles
from lowrank import methods, pretrained
from lowrank.adapters.export import innermost
from lowrank.core import files, tree
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.pretrained.quantize_on_load import DEFAULT_TARGET


def measured(study: Study, task: Task, name: str) -> dict[str, float]:
    """`{score, bits_in_memory, bits_on_disk}` of a base on a task; kept beside the cells."""
    path = study.results / "cells" / task.name / name / "untuned.json"
    config = study.config(task, Row("", {"name": "full"}, (), model=BASES[name]), 0.0, 0)
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("config") != files.to_json(config):
        base = load(config.model)
        score = UNTUNED[task.name](Model(config, base, None))
        found = {"config": files.to_json(config), "score": score, **bits(base.params)}
        files.write_json(path, found)
    return found


def load(model: Mapping[str, Any]) -> pretrained.Pretrained:
    """The base that a model group names."""
    options, read = _read(model)
    return pretrained.load(options.pop("name"), model=options, **read)


def _read(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model group as the config's fields, and how its kernels are read."""
    options = dict(model)
    return options, {"param_dtype": options.pop("param_dtype", "float32"), "quantized": options.pop("quantize", None)}


def bits(params: PyTree) -> dict[str, float]:
    """The bits per weight of the quantized kernels: of the arrays in memory, and of the file that holds them."""
    weights = dict(tree.named_leaves(params, is_weight))
    named = {name: weights[name] for name in tree.match_names(DEFAULT_TARGET, weights)}
    count = sum(math.prod(w.shape) for w in named.values())
    arrays = {f"{n}/{part}": np.asarray(x) for n, w in named.items() for part, x in tree.named_leaves(w)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.safetensors"
        save_file(arrays, path)
        stored = path.stat().st_size
    held = sum(x.nbytes for x in arrays.values())
    return {"bits_in_memory": 8 * held / count, "bits_on_disk": 8 * stored / count}


def bits_under(row: Row, name: str, model: Mapping[str, Any]) -> float:
    """The bits per weight in memory of the row's forms in place of the quantized kernels, from shapes alone."""
    options, read = _read({**model, **row.model})
    shapes = pretrained.describe(name, options, **read)[2]
    shapes = jax.eval_shape(lambda p: methods.attach(methods.build_method(row.method), p, jax.random.key(0)), shapes)
    weights = dict(tree.named_leaves(shapes, is_weight))
    kernels = [innermost(weights[name]) for name in tree.match_names(DEFAULT_TARGET, weights)]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kernels))
    return 8 * held / sum(math.prod(w.shape) for w in kernels)


def by_centroid(model: Model) -> float:
    """The accuracy on test articles of the class whose mean embedding over the training articles is nearest."""
    (known, labels), (new, truth) = (embed_articles(model, "{text}", split) for split in ("train", "test"))
    centroids = np.stack([known[labels == label].mean(0) for label in np.unique(labels)])
    return float(np.mean(np.unique(labels)[np.argmax(new @ centroids.T, axis=1)] == truth))


def headline_perplexity(model: Model) -> float:
    """The perplexity of the test headlines."""
    return model.score("test")["perplexity"]


UNTUNED: dict[str, Callable[[Model], float]] = {"topics": by_centroid, "headlines": headline_perplexity}
