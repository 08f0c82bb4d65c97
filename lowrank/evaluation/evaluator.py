"""Scores on held-out data during a run: the objective's, and those of generated texts against their references."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank import data
from lowrank.core import config_schema, sharding
from lowrank.core.errors import UserError
from lowrank.core.typing import Bind, Network, PyTree, Tokenizer
from lowrank.data.transforms import NONE
from lowrank.evaluation import long_context
from lowrank.evaluation.held_out import HeldOut, named_configs
from lowrank.evaluation.infilling import Base, build_infilling
from lowrank.generation import generate, generator
from lowrank.objectives import Objective


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The `eval` group of a config: scores before the first step, after the last one, and between them."""

    split: str = ""  # the held-out split; empty: no evaluation
    before: bool = True  # whether the model is scored before the first step
    every: int = 0  # steps between two evaluations; 0: only before the first step and after the last one
    max_examples: int = 0  # the number of records to score; 0: all
    # Sources that are scored apart, in place of the training data's: name -> source, or keys of the group `data`.
    sources: Mapping[str, Any] | None = None
    texts: int = 0  # the number of prompts to continue before and after training, for the scores of texts
    max_new: int = 40  # tokens per text
    # The group of `infilling.InfillingConfig`: gaps in held-out documents are filled in before and after training.
    infill: Mapping[str, Any] | None = None
    samples: int = 3  # the number of texts that the report shows
    long: Mapping[str, Any] | None = None  # the group of long_context.LongConfig, for `launch.evaluate --long`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 0:
                raise UserError(f"eval.{field.name}={getattr(self, field.name)} is below 0: set it to 0 or more")
        if not self.split and (self.every or self.texts or self.sources or self.infill is not None):
            raise UserError("eval.split is not set: name the split of the data to score the model on")
        config_schema.call_with_group(long_context.LongConfig, self.long or {}, "eval.long")

    def better(self, of_objective: Mapping[str, str]) -> dict[str, str]:
        """`Score.better` of an objective under the names of the run's scores: `old/perplexity` of the source `old`."""
        return {
            f"{name}/{key}" if name else key: v for name in self.sources or ("",) for key, v in of_objective.items()
        }


class Evaluator:
    """Scores parameters on the split of an `EvalConfig`. The data are read, and checked, when it is made."""

    def __init__(
        self,
        config: EvalConfig,
        objective: Objective,
        train: data.DataConfig,
        tokenizer: Tokenizer,
        network: Network,
        bind: Bind | None,
        mesh: Mesh,
        chunk_tokens: int,
    ):
        """`train` is the training data's config: the held-out data are read, rendered and cut in the same way.

        About `chunk_tokens` tokens have their logits in memory at a time; 0: all of a batch's. Raises UserError for
        data that cannot be read, and for texts that the objective does not generate.
        """
        once = {"epochs": 1, "shuffle": False, "prefetch": 0, "holdout": 0.0, **NONE}
        held_out = dataclasses.replace(train, split=config.split, max_examples=config.max_examples, **once)
        self.config, self._objective, self._tokenizer = config, objective, tokenizer
        self._network, self._bind, self._mesh, self._chunk_tokens = network, bind, mesh, chunk_tokens
        self.held_out = held_out  # the config of its data
        named = named_configs(config.sources, held_out)
        self._held_out = {name: HeldOut(one, tokenizer, objective) for name, one in named.items()}
        self._infilling = build_infilling(config.infill, train, held_out, tokenizer)
        self._records: list[Mapping[str, Any]] = []
        if config.texts:
            _check_texts(config, objective, train)
            few = dataclasses.replace(held_out, max_examples=config.texts)
            self._records = data.read_examples(few, tokenizer, config.max_new, objective.row_format)

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of the texts' prompts."""
        return [record["prompt_ids"] for record in self._records]

    @property
    def text_sizes(self) -> generator.Sizes:
        """The sizes of the state in which the texts are written."""
        stops = tuple(self._tokenizer.stop_ids)
        requests = [generator.Request(ids, self.config.max_new, stops) for ids in self.prompts]
        return generator.fit(self._network.config, requests)

    def due(self, step: int) -> bool:
        """Whether a periodic evaluation falls on `step`."""
        return self.config.every > 0 and step % self.config.every == 0

    def remember(self, params: PyTree) -> None:
        """Takes these parameters as the reference that the scores compare with, for an objective that has one."""
        for held_out in self._held_out.values():
            held_out.remember(self._network, params, **self._options)

    def scores(self, params: PyTree) -> dict[str, float]:
        """The objective's scores of the held-out batches by name, those of a named source as `NAME/SCORE`."""
        found = {name: one.scores(self._network, params, **self._options) for name, one in self._held_out.items()}
        return {f"{name}/{key}" if name else key: value for name, of in found.items() for key, value in of.items()}

    @property
    def _options(self) -> dict[str, Any]:
        """The keywords of `evaluate` and `row_values`."""
        per_token = self._objective.row_format.per_token
        put = functools.partial(sharding.make_global_batch, mesh=self._mesh, per_token=per_token)
        return {"bind": self._bind, "put": put, "chunk_tokens": self._chunk_tokens}

    def texts(self, params: PyTree) -> tuple[dict[str, float], list[str]]:
        """`(scores, texts)` of the greedy continuations of the first `config.texts` prompts; empty without prompts.

        The scores of infilling are among them, as `infill/SCORE`.
        """
        model = self._network.config, self._network
        filled = self._infilling.scores(*model, params, **self._options) if self._infilling else {}
        scores = {f"infill/{name}": value for name, value in filled.items()}
        if not self._records:
            return scores, []
        base = Base(self._network.config, self._tokenizer)
        texts = generate.texts(base, params, self.prompts, max_new=self.config.max_new, bind=self._bind)
        return scores | self._objective.score_texts(texts, [r["completion"] for r in self._records]), texts

    def lowered(self, params: PyTree) -> jax.stages.Lowered:
        """The program that reads the longest prompts of the texts for `params` in shapes, ready to compile."""
        longest = max(len(ids) for ids in self.prompts)
        return generator.lowered(self._network, params, self.text_sizes, longest, bind=self._bind)

    def samples(self, before: list[str], after: list[str]) -> list[dict[str, str]]:
        """The first few prompts with their reference and both continuations."""
        columns = zip(self._records, before, after, strict=True)
        return [
            {"prompt": r["prompt"], "reference": r["completion"], "before": b, "after": a}
            for r, b, a in list(columns)[: self.config.samples]
        ]


def _check_texts(config: EvalConfig, objective: Objective, train: data.DataConfig) -> None:
    """Raises UserError unless the objective generates texts, and these leave space for a prompt in a row."""
    if objective.score_texts is None:
        asked = f"eval.texts={config.texts} continues prompts, which this objective does not"
        raise UserError(f"{asked}: set eval.texts=0, or objective=causal_lm")
    if not 0 < config.max_new < train.seq_len:
        raise UserError(f"eval.max_new={config.max_new} must be between 1 and data.seq_len={train.seq_len} - 1")
