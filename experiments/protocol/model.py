"""A trained model as the measures of a study meet it: scored on splits, and asked for embeddings and labels."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lowrank import data
from lowrank.core.typing import BatchInfo, Bind, PyTree
from lowrank.evaluation import evaluate
from lowrank.models import build_model
from lowrank.objectives import Objective, build_objective, classification
from lowrank.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to score: the config of its run, and a `lowrank.pretrained.Pretrained` with its parameters."""

    run: ConfigDict
    base: Any
    bind: Bind | None

    def loader(self, objective: Objective, **changes: Any) -> data.Loader:
        """One pass over the batches in order, with changes of the run's data group."""
        group = {**self.run.data, "shuffle": False, "epochs": 1, "prefetch": 0, "max_examples": self.examples}
        config = data.DataConfig(**{**group, **changes})
        return data.make_loader(config, self.base.tokenizer, row_format=objective.row_format)

    @property
    def examples(self) -> int:
        """The number of examples that are scored; 0: all."""
        return self.run.eval.max_examples

    def score(self, split: str) -> dict[str, float]:
        """The scores of the run's objective on a split."""
        return self.evaluate(build_objective(self.run.objective), split=split)

    def evaluate(self, objective: Objective, **changes: Any) -> dict[str, float]:
        """The scores of an objective with changes of the data group, and with the run's chunks of logits."""
        return evaluate(
            objective,
            build_model(self.base.config),
            self.base.params,
            self.loader(objective, **changes),
            bind=self.bind,
            chunk_tokens=self.run.get("logits_chunk_tokens", RunConfig.logits_chunk_tokens),
        )


def embed_articles(model: Model, template: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[N, D]` of the articles of a split, and their labels `[N]`."""
    vectors, labels = _outputs(model, "pooled", template=template, split=split)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def right_answers(model: Model, split: str) -> np.ndarray:
    """Whether a classifier names the label of each article of a split: bool `[N]`."""
    logits, labels = _outputs(model, "__call__", split=split)
    return logits.argmax(axis=1) == labels


def _outputs(model: Model, method: str, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a method of the network makes of the articles, `[N, ...]` in float32, and their labels `[N]`."""
    loader, network = model.loader(classification(), **changes), build_model(model.base.config)
    batches = list(loader)
    rows = [np.asarray(_apply(network, model.bind, method, model.base.params, dict(batch))) for batch in batches]
    count = loader.stats["examples"]
    return np.concatenate(rows)[:count], np.concatenate([batch["labels"] for batch in batches])[:count]


@functools.partial(jax.jit, static_argnames=("network", "bind", "method"))
def _apply(network: Any, bind: Bind | None, method: str, params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
    params = bind(params, BatchInfo(batch["segments"]), None) if bind else params
    out = network.apply({"params": params}, batch["tokens"], batch["segments"], method=method)
    return out.astype(jnp.float32)
