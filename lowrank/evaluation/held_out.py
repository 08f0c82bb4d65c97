"""Held-out batches, the scores of a model on them, and the reference that some objectives compare with."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank import data
from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, Bind, Network, PyTree, Tokenizer
from lowrank.evaluation.evaluate import evaluate, row_values
from lowrank.objectives import Objective
from lowrank.objectives.objective import REFERENCE, Rollout
from lowrank.objectives.rollouts import write_texts


class HeldOut:
    """The held-out batches of one source, which are read, and checked, when it is made."""

    def __init__(self, config: data.DataConfig, tokenizer: Tokenizer, objective: Objective) -> None:
        """`config` reads its records once and in order. Raises UserError for data that cannot be read."""
        self._objective, self._tokenizer = objective, tokenizer
        once_each = dataclasses.replace(objective.row_format, copies=1)
        self._loader = data.make_loader(config, tokenizer, row_format=once_each)
        self._first = self._loader.get_state()
        self._references: list[np.ndarray] = []  # of each batch, where the objective compares with a reference

    def remember(self, network: Network, params: PyTree, **options: Any) -> None:
        """Takes these parameters as the reference of the scores, for an objective that has one.

        The options are those of `evaluate`.
        """
        comparison = self._objective.comparison
        if comparison and comparison.reference and not self._objective.rollout:
            self._loader.set_state(self._first)
            values = functools.partial(row_values, self._objective, network, params, **options)
            self._references = [values(batch) for batch in self._loader]

    def scores(self, network: Network, params: PyTree, **options: Any) -> dict[str, float]:
        """The objective's scores of the batches by name; the options are those of `evaluate`."""
        self._loader.set_state(self._first)
        batches: Iterable[Batch] = self._loader
        if rollout := self._objective.rollout:
            written = functools.partial(self._written, rollout, network, params, options.get("bind"))
            batches = (written(i, batch) for i, batch in enumerate(self._loader))
        if self._references:
            both = zip(self._loader, self._references, strict=True)
            batches = ({**batch, REFERENCE: reference} for batch, reference in both)
        return evaluate(self._objective, network, params, batches, **options)

    def _written(
        self, rollout: Rollout, network: Network, params: PyTree, bind: Bind | None, i: int, batch: Batch
    ) -> Batch:
        """Batch `i` with one text for each prompt, drawn in the same way each time."""
        return write_texts(
            rollout,
            network,
            params,
            batch,
            tokenizer=self._tokenizer,
            records=self._loader.record,
            rng=jax.random.key(i),
            bind=bind,
        )


def named_configs(sources: Mapping[str, Any] | None, held_out: data.DataConfig) -> dict[str, data.DataConfig]:
    """The config of each of the `eval.sources`, a source's name or keys of the group `data` that replace `held_out`'s.

    Without sources it is `held_out` alone, under the empty name. Raises UserError for a name that is not one word and
    for an unknown key.
    """
    configs = {}
    for name, group in (sources or {}).items():
        if not name.isidentifier():
            raise UserError(f"eval.sources.{name}: the name is not one word of letters, such as old")
        group = {"source": group} if isinstance(group, str) else group
        configs[name] = config_schema.replace_fields(held_out, group, f"eval.sources.{name}")
    return configs or {"": held_out}
