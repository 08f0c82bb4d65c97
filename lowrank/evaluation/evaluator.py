"""Scores on held-out data during a run: of the loss, and of generated texts against their references."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank import data
from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.evaluation import scores as evaluate
from lowrank.generation import generate


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The `eval` group of a config: scores before the first step, after the last one, and in between."""

    split: str = ""  # '': no evaluation
    every: int = 0  # steps between two evaluations; 0: only before and after
    max_examples: int = 0  # 0: all
    texts: int = 0  # how many prompts to continue, before and after, for ROUGE, BLEU and exact match
    max_new: int = 40  # tokens a text
    samples: int = 3  # texts that the report shows

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "split" and getattr(self, field.name) < 0:
                raise UserError(f"eval.{field.name}={getattr(self, field.name)} is below 0")
        if not self.split and (self.every or self.texts):
            raise UserError("eval.split is not set: it names what to score on")


class Evaluator:
    """Scores parameters on the split of an `EvalConfig`. The data are read, and checked, when it is made."""

    def __init__(
        self,
        config: EvalConfig,
        train: data.DataConfig,
        tokenizer: Any,
        network: Any,
        bind: Callable[[PyTree, Any, Any], PyTree] | None,
        mesh: Mesh,
        rows: int,
    ):
        """`train` is the training data's config: the held-out data are read, rendered and cut in the same way.

        `rows`: tokens whose logits exist at a time; 0: all of a batch's.
        """
        once = {"epochs": 1, "shuffle": False, "prefetch": 0, "holdout": 0.0}
        held_out = dataclasses.replace(train, split=config.split, max_examples=config.max_examples, **once)
        self.config, self._tokenizer, self._network, self._bind, self._mesh = config, tokenizer, network, bind, mesh
        self._rows = rows
        self._loader = data.make_loader(held_out, tokenizer, jax.process_index(), jax.process_count())
        self._first = self._loader.get_state()
        self._records: list[Mapping[str, Any]] = []
        if config.texts:
            if self._loader.labels:
                raise UserError("eval.texts continues prompts: it needs objective=causal_lm")
            if not 0 < config.max_new < train.seq_len:
                raise UserError(f"eval.max_new={config.max_new} must be between 1 and data.seq_len={train.seq_len} - 1")
            few = dataclasses.replace(held_out, max_examples=config.texts)
            self._records = data.examples(few, tokenizer, reserve=config.max_new)

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of the texts' prompts."""
        return [record["prompt_ids"] for record in self._records]

    @property
    def largest(self) -> tuple[int, int]:
        """`(rows, prompt positions)` of the largest batch of texts."""
        return generate.largest_batch([len(ids) for ids in self.prompts], self._network.config)

    def due(self, step: int) -> bool:
        """Whether a periodic evaluation falls on `step`."""
        return self.config.every > 0 and step % self.config.every == 0

    def scores(self, params: PyTree) -> dict[str, float]:
        """`{perplexity, nll, tokens}`, or `{accuracy, macro_f1, examples}` of a classifier."""
        self._loader.set_state(self._first)
        perplexity = functools.partial(evaluate.perplexity, rows=self._rows)
        score = evaluate.classification if self._loader.labels else perplexity
        put = functools.partial(sharding.make_global_batch, mesh=self._mesh)
        return score(self._network, params, self._loader, bind=self._bind, put=put)

    def texts(self, params: PyTree) -> tuple[dict[str, float], list[str]]:
        """`(scores, texts)` of the greedy continuations of the first `config.texts` prompts; nothing without them."""
        if not self._records:
            return {}, []
        base = _Base(self._network.config, self._tokenizer)
        found = generate.texts(base, params, self.prompts, max_new=self.config.max_new, bind=self._bind)
        return evaluate.texts(found, [record["completion"] for record in self._records]), found

    def lowered(self, params: PyTree) -> jax.stages.Lowered:
        """The program of the largest batch of texts for `params` in shapes, ready to compile."""
        max_new, pad = self.config.max_new, self._tokenizer.pad_id
        stops = tuple(sorted(self._tokenizer.stop_ids))
        return generate.lowered(self._network, params, *self.largest, max_new, stops, pad_id=pad, bind=self._bind)

    def samples(self, before: list[str], after: list[str]) -> list[dict[str, str]]:
        """The first few prompts with their reference and both continuations."""
        columns = zip(self._records, before, after, strict=True)
        return [
            {"prompt": r["prompt"], "reference": r["completion"], "before": b, "after": a}
            for r, b, a in list(columns)[: self.config.samples]
        ]


@dataclasses.dataclass(frozen=True)
class _Base:
    config: Any
    tokenizer: Any
