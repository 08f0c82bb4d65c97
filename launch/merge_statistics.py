"""The statistics of models that a recipe of `launch.combine` asks for, computed from the data that it names.

They are kept in the folder `merge_statistics` beside the output, one safetensors file for each model and request, and
are not computed again while both stay the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lowrank import data, pretrained
from lowrank.adapters import load
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import PathLike, as_local_path
from lowrank.core.typing import Batch, Network, PyTree
from lowrank.core.weight import merge
from lowrank.data import sources
from lowrank.merging import statistics
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.output import digest_of
from lowrank.merging.recipe import ModelSpec, Recipe, Request, Source
from lowrank.models import build_model
from lowrank.objectives import causal_lm
from lowrank.pretrained import Pretrained
from lowrank.pretrained.families import FAMILIES

FOLDER = "merge_statistics"
ROWS, BATCH, CHUNK_TOKENS = 64, 4, 1024
LABELS = ("model", "data")
KINDS: dict[str, Callable[..., Any]] = {"fisher": statistics.fisher, "gram": statistics.grams}
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


def check(recipe: Recipe) -> None:
    """Raises UserError for requests that cannot be read, before a model is: unknown labels, data that do not exist."""
    for source in _requests(recipe):
        request, group = _request(source), _data_config(_request(source))
        if request.get("labels", LABELS[0]) not in LABELS:
            raise unknown("labels of statistics", request["labels"], LABELS)
        if " + " not in group.source:
            sources.open_source(group.source, group.split, group.data_dir)


def with_files(recipe: Recipe, output: PathLike, progress: Progress = iter) -> Recipe:
    """The recipe with the file of its statistics in place of every request; what is missing is computed.

    `progress` wraps the batches of each model. Raises UserError for data and models that do not fit.
    """
    if not _requests(recipe):
        return recipe
    check(recipe)
    folder = as_local_path(output).parent / FOLDER

    def filled(source: Source, kind: str) -> Source:
        if not isinstance(source.statistics, dict):
            return source
        if not kind:  # the rule reads none
            return dataclasses.replace(source, statistics=None)
        path = folder / f"{_digest(source.model, source.statistics, kind)}.safetensors"
        if not path.exists():
            statistics.write(path, compute(source.model, source.statistics, kind, progress))
        return dataclasses.replace(source, statistics=str(path))

    slices = [
        dataclasses.replace(part, sources=tuple(filled(source, part.rule.statistics) for source in part.sources))
        for part in recipe.slices
    ]
    return dataclasses.replace(recipe, slices=tuple(slices))


def compute(spec: ModelSpec, request: Request, kind: str, progress: Progress = iter) -> dict[str, Any]:
    """The statistics of a model, `fisher` or `gram`, by tensor, from the language modeling of the request's rows."""
    base = load_merged(spec)
    found = measure(base, base.params, progress(loader(base, request)), kind, request.get("labels", LABELS[0]))
    return statistics.by_tensor(FAMILIES[base.family].tensors(base.config), found, square=kind == "gram")


def measure(
    base: Pretrained,
    params: PyTree,
    batches: Iterable[Batch],
    kind: str,
    labels: str = LABELS[0],
    chosen: statistics.Chosen = bool,
) -> dict[str, Any]:
    """The statistics of the leaves that are `chosen`, by leaf name; `params` are plain arrays in the tree of `base`."""
    network = build_model(base.config)
    draw = statistics.draw_targets(network) if labels == LABELS[0] else None
    return KINDS[kind](_loss(network), params, batches, draw=draw, chosen=chosen)


@functools.cache
def _loss(network: Network) -> statistics.Loss:
    def loss(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = causal_lm().loss(network, params, batch, CHUNK_TOKENS)
        return sums.total, sums.weight

    return loss


def load_merged(spec: ModelSpec) -> Pretrained:
    """A decoder with its adapter merged into plain arrays. Raises UserError for a model that is no decoder."""
    how = {"model": {"remat": "dots"}, "param_dtype": "float32"}
    base = (
        load.load_adapted(spec.adapter, spec.path, **how)
        if spec.adapter
        else pretrained.load(spec.path, revision=spec.revision, **how)
    )
    causal_lm().check_model(str(spec), base.config)
    return dataclasses.replace(base, params=merge(base.params))


def loader(base: Pretrained, request: Request) -> data.Loader:
    """One pass over a request's rows, a record in each."""
    return data.make_loader(_data_config(request), base.tokenizer, row_format=causal_lm().row_format)


def _data_config(request: Request) -> data.DataConfig:
    rows = request.get("rows", ROWS)
    if rows < 1:
        raise UserError(f"rows={rows} of statistics is below 1: they need at least one row")
    given: dict[str, Any] = {k: v for k, v in request.items() if k not in ("data", "rows", "labels")}
    fixed: dict[str, Any] = {
        "packing": False,
        "epochs": 1,
        "prefetch": 0,
        "prompt_loss_weight": 0.0,
        "batch_size": min(rows, BATCH),
    }
    return data.DataConfig(source=request["data"], max_examples=rows, **given, **fixed)


def _requests(recipe: Recipe) -> list[Source]:
    return [s for part in recipe.slices for s in part.sources if isinstance(s.statistics, dict)]


def _request(source: Source) -> Request:
    assert isinstance(source.statistics, dict)
    return source.statistics


def _digest(spec: ModelSpec, request: Request, kind: str) -> str:
    """A name for the statistics, which changes with the files of the model and with the request."""
    where = [Checkpoint(spec._replace(adapter=None)).folder, *([as_local_path(spec.adapter)] if spec.adapter else [])]
    paths = [path for folder in where for path in (sorted(folder.glob("*.safetensors")) or [folder])]
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return f"{kind}-{digest_of(str(spec), stamps, request)[:16]}"
