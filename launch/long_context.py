"""The long-context scores of a run, for `launch.evaluate --long=...`: its readers, its texts, and the files."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowrank import data, models, pretrained
from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.evaluation import long_context
from lowrank.evaluation.long_context.config import DATA, POSITIONS, PRICE, SLIDING, check_scores
from lowrank.evaluation.long_context.score import context_of
from lowrank.training.run import Run

FOLDER = "long_context"  # in the run's folder
CONTEXT = ("context", "rope", "context_theta")  # the options that extend a base


def check(run: Run, names: Sequence[str]) -> long_context.LongConfig:
    """The settings of the scores. Raises UserError, before a weight is read, for those that cannot be taken."""
    check_scores(names)
    if run.objective.score_texts is None:
        raise UserError("--long scores a model that writes texts, which this objective does not train: leave it out")
    settings = config_schema.call_with_group(long_context.LongConfig, run.scorer.config.long or {}, "eval.long")
    base = pretrained.describe(run.model.name, _base_options(run), param_dtype=run.model.param_dtype)[0]
    long_context.check(names, settings, context_of(run.network.config), context_of(base))
    return settings


def score(run: Run, params: PyTree, names: Sequence[str], directory: PathLike) -> dict[str, float]:
    """The scores of these names of the run's model with trained parameters; writes their tables and heat maps."""
    settings, base = check(run, names), None
    if PRICE in names:
        plain = dataclasses.replace(run, options=_base_options(run)).load()
        base = _reader(run, plain.config, plain.params, None)
    reads = settings.filler == DATA or {SLIDING, POSITIONS, PRICE} & {*names}
    documents = data.read_documents(run.scorer.held_out, run.tokenizer, settings.tokens) if reads else []
    reader = _reader(run, run.network.config, params, run.method.bind)
    found = long_context.score(names, reader, run.tokenizer, documents, settings, base)
    long_context.write(found, as_path(directory) / FOLDER)
    return found.scores


def _base_options(run: Run) -> dict[str, Any]:
    """The options of the base's config, without the method's own and those that extend its context."""
    return {k: v for k, v in run.options.items() if k not in (*CONTEXT, *run.method.model_options)}


def _reader(run: Run, config: Any, params: PyTree, bind: Any) -> long_context.Reader:
    network = models.build_model(models.inference_config(config))
    rows = run.loader.shapes["tokens"][0][0]
    return long_context.Reader(network, params, bind, run.mesh, rows, run.logits_chunk_tokens)
