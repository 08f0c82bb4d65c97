"""A base before any tuning: its score, and the bits of its kernels in memory and on disk, kept in `bases.csv`."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from experiments.protocol.experiment import Row
from experiments.protocol.model import Model, embed_articles
from experiments.protocol.row_by_row import Runs
from experiments.protocol.table import read_rows
from experiments.quantization.rows import BASES
from lowrank import methods, pretrained
from lowrank.adapters.export import innermost
from lowrank.core import tree
from lowrank.core.config_file import with_changes
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.pretrained.quantize_on_load import DEFAULT_TARGET
from lowrank.sweeps.cells import cell_key
from lowrank.sweeps.tables import write_csv

BASES_FILE = "bases.csv"
COLUMNS = ("task", "base", "key", "score", "bits_per_weight", "bits_on_disk")


def config_of(runs: Runs, base: str) -> dict[str, Any]:
    """The config that scores a base untuned."""
    plain = {**runs.config(runs.rows[0]), "method": {"name": "full"}, "steps": 0}
    return with_changes(plain, {f"model.{key}": value for key, value in BASES[base].items()})


def find(runs: Runs, base: str) -> Mapping[str, str] | None:
    """The line of a base; None if it is not measured."""
    path, key = runs.record.path.with_name(BASES_FILE), cell_key(config_of(runs, base))
    return next((line for line in (read_rows(path) if path.exists() else []) if line["key"] == key), None)


def measure(runs: Runs, row: Row) -> None:
    """Scores the base of a row and counts its bits, unless that is done."""
    if find(runs, base := row.labels["base"]):
        return
    path, config = runs.record.path.with_name(BASES_FILE), config_of(runs, base)
    task, loaded = runs.task.experiment.task, load(config["model"])
    line = {"task": task, "base": base, "key": cell_key(config)}
    line |= {"score": UNTUNED[task](Model(ConfigDict(config), loaded, None)), **bits(loaded.params)}
    place = lambda of: (of["task"], of["base"])  # noqa: E731
    lines = [known for known in (read_rows(path) if path.exists() else []) if place(known) != place(line)]
    write_csv(path, COLUMNS, sorted([*lines, line], key=place))


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
    return {"bits_per_weight": 8 * held / count, "bits_on_disk": 8 * stored / count}


def bits_under(config: Mapping[str, Any]) -> float:
    """The bits per weight in memory of a run's forms in place of the quantized kernels, from shapes alone."""
    options, read = _read(config["model"])
    method, shapes = (
        methods.build_method(config["method"]),
        pretrained.describe(options.pop("name"), options, **read)[2],
    )
    shapes = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), shapes)
    weights = dict(tree.named_leaves(shapes, is_weight))
    kernels = [innermost(weights[name]) for name in tree.match_names(DEFAULT_TARGET, weights)]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kernels))
    return 8 * held / sum(math.prod(w.shape) for w in kernels)


def by_centroid(model: Model) -> float:
    """The accuracy on test articles of the class whose mean embedding over the training articles is nearest."""
    splits = (model.run.data.split, model.run.eval.split)
    (known, labels), (new, truth) = (embed_articles(model, "{text}", split) for split in splits)
    centroids = np.stack([known[labels == label].mean(0) for label in np.unique(labels)])
    return float(np.mean(np.unique(labels)[np.argmax(new @ centroids.T, axis=1)] == truth))


def headline_perplexity(model: Model) -> float:
    """The perplexity of the test headlines."""
    return model.score(model.run.eval.split)["perplexity"]


UNTUNED: dict[str, Callable[[Model], float]] = {"topics": by_centroid, "headlines": headline_perplexity}
