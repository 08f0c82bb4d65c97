"""The two common tasks of the studies: their training data, their scores, and their measures of forgetting.

`topics`: MiniLM-L6 names the section of a BBC article, scored by accuracy. Its forgetting is the loss of top-1 accuracy
when its embeddings, for which it was pretrained, find a test article by its headline.
`headlines`: SmolLM2-135M writes the headline of a BBC article, scored by the perplexity of held-out headlines. Its
forgetting is the rise of perplexity on the articles' running text, on which it is not trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from lowrank import data
from lowrank.core.typing import BatchInfo, Bind, PyTree
from lowrank.evaluation import evaluate
from lowrank.models import build_model
from lowrank.objectives import Objective, build_objective, causal_lm, classification
from lowrank.training.config import RunConfig

ARTICLES = 4  # the number of articles whose text measures forgetting: about 1,800 tokens, the same for every row


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the study. `sign` is 1 if a higher score is better and -1 if a lower score is better."""

    name: str
    metric: str  # a key of the run's scores
    sign: int
    knowledge: str  # the unit of the `forgetting` column
    settings: Mapping[str, Any]  # the config without method, learning rate and seed
    known: Callable[["Model"], float]  # the score on the pretraining task, where higher is better

    def config(self, row: Any, lr: float, seed: int) -> ConfigDict:
        """The config of one run of a `study.Row`."""
        config = common.new(**{k: dict(v) if isinstance(v, Mapping) else v for k, v in self.settings.items()})
        config.method, config.optim.lr, config.seed, config.data.seed = dict(row.method), lr, seed, seed
        config.model.update(row.model)
        config.optim.update(row.optim)
        return config


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


def retrieval_accuracy(model: Model) -> float:
    """The share of test articles whose embedding is the nearest, among all articles, to that of their headline."""
    titles, texts = (embed_articles(model, template, "test")[0] for template in ("{title}", "{text}"))
    return float(np.mean(np.argmax(titles @ texts.T, axis=1) == np.arange(len(titles))))


def embed_articles(model: Model, template: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[N, D]` of the articles of a split, and their labels `[N]`."""
    loader = model.loader(classification(), split=split, template=template)
    network = build_model(model.base.config)
    batches = list(loader)
    rows = [np.asarray(_pooled(network, model.bind, model.base.params, dict(batch))) for batch in batches]
    vectors = np.concatenate(rows)[: loader.stats["examples"]]
    labels = np.concatenate([batch["labels"] for batch in batches])[: len(vectors)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


@functools.partial(jax.jit, static_argnames=("network", "bind"))
def _pooled(network: Any, bind: Bind | None, params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
    params = bind(params, BatchInfo(batch["segments"]), None) if bind else params
    return network.apply({"params": params}, batch["tokens"], batch["segments"], method="pooled").astype(jnp.float32)


def fluency(model: Model) -> float:
    """Minus the perplexity of the running text of the first test articles."""
    few = {"max_examples": min(model.examples or ARTICLES, ARTICLES)}
    return -model.evaluate(causal_lm(), split="test", template="text", completion="", **few)["perplexity"]


TOPICS = Task(
    name="topics",
    metric="accuracy",
    sign=1,
    knowledge="points of top-1 retrieval lost",
    known=lambda model: 100 * retrieval_accuracy(model),
    settings={
        "steps": 40,
        "objective": "classification",
        "model": {"name": "minilm-l6", "remat": "none"},
        "data": {"source": "bbc_news", "split": "train", "seq_len": 32, "batch_size": 16},
        "optim": {"name": "adamw", "schedule": "linear", "warmup": 4, "weight_decay": 0.01},
        "eval": {"split": "validation", "max_examples": 0},
        "log_every": 5,
    },
)
HEADLINES = Task(
    name="headlines",
    metric="perplexity",
    sign=-1,
    knowledge="rise of perplexity on articles",
    known=fluency,
    settings={
        "steps": 20,
        "objective": "causal_lm",
        "model": {"name": "smollm2-135m", "remat": "dots"},
        "data": {
            "source": "bbc_news",
            "split": "train",
            "template": "headline",
            "seq_len": 48,
            "batch_size": 8,
            "packing": False,
            "prompt_loss_weight": 0.0,
        },
        "optim": {"name": "adamw", "schedule": "linear", "warmup": 3},
        "eval": {"split": "validation", "max_examples": 64},
        "log_every": 4,
    },
)
TASKS = {task.name: task for task in (TOPICS, HEADLINES)}
