"""The texts that a run writes itself and learns from, for an objective with a rollout.

They are drawn from the run's seed and the step, so that a resumed run writes the same ones. Where several steps learn
from the same texts, a checkpoint between these steps holds the texts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank import models
from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.core.typing import Arrays, Batch, HostArrays, PyTree
from lowrank.evaluation.evaluate import row_values
from lowrank.generation import generator
from lowrank.methods.method import MapBatch
from lowrank.objectives.rollouts import sizes, write_texts
from lowrank.training import random_streams
from lowrank.training.run import Run

TEXTS = "texts"  # the root of the arrays in a checkpoint


class Texts:
    """The texts of a run, without any for an objective whose batches are complete."""

    def __init__(self, run: Run) -> None:
        self._run, self._rollout = run, run.objective.rollout
        self._network: Any = models.build_model(models.inference_config(run.network.config)) if self._rollout else None
        several = self._rollout is not None and self._rollout.updates > 1
        self._kept: HostArrays = {name: np.zeros(*of) for name, of in run.loader.shapes.items()} if several else {}

    def batch(self, map_batch: MapBatch, params: Callable[[], PyTree], done: int) -> Batch | None:
        """The batch of step `done` (from 0), by `params()`, or None where the data have ended.

        Raises UserError as the loader and reward functions do; where these fail, the loader stays before the batch.
        """
        loader = self._run.loader
        if self._rollout and done % self._rollout.updates:
            return self._kept
        before = loader.get_state() if self._rollout else None
        batch = next(loader, None)
        try:
            return None if batch is None else self.write(map_batch(batch), params, done)
        except UserError:
            if before:
                loader.set_state(before)
            raise

    def write(self, batch: Batch, params: Callable[[], PyTree], done: int) -> Batch:
        """The batch of step `done` (from 0) with texts, by `params()`. Raises UserError as reward functions do."""
        run, rollout = self._run, self._rollout
        if not rollout:
            return batch
        bind, now = run.method.bind, params()
        written = write_texts(
            rollout,
            self._network,
            now,
            batch,
            tokenizer=run.tokenizer,
            records=run.loader.record,
            rng=random_streams.rollout_key(run.config.seed, done),
            bind=bind,
        )
        written |= rollout.compare(written)
        if rollout.old:
            options: dict[str, Any] = {"bind": bind, "put": run.put, "chunk_tokens": run.logits_chunk_tokens}
            written[rollout.old] = row_values(run.objective, run.network, now, written, **options)
        self._kept = written if rollout.updates > 1 else {}
        return written

    def arrays(self) -> Arrays:
        """The texts as a checkpoint holds them, on every device."""
        where = sharding.replicated_sharding(self._run.mesh)
        return {f"{TEXTS}/{name}": jax.device_put(x, where) for name, x in self._kept.items()}

    def restore(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Takes the texts out of the arrays of a checkpoint, and returns the others."""
        rest = dict(arrays)
        self._kept = {name: np.array(rest.pop(f"{TEXTS}/{name}")) for name in self._kept}
        return rest


def text_sizes(run: Run) -> generator.Sizes:
    """The sizes of the state in which the texts of a step are written."""
    rollout, (rows, length) = run.objective.rollout, run.loader.shapes["tokens"][0]
    assert rollout is not None
    stops = run.tokenizer.stop_ids if run.tokenizer else ()  # a planned run may lack a tokenizer
    return sizes(rollout, run.network.config, rows, length, stops)


def lowered(run: Run, params: PyTree) -> jax.stages.Lowered:
    """The program that reads the prompts of all texts of a step, for `params` in shapes, ready to compile."""
    rollout, length = run.objective.rollout, run.loader.shapes["tokens"][0][-1]
    assert rollout is not None
    network: Any = models.build_model(models.inference_config(run.network.config))
    return generator.lowered(network, params, text_sizes(run), length - rollout.max_new, run.method.bind)
