"""The reference of a run whose loss compares with its start: the log-probabilities of every record, stored by number.

They are computed once, before step 1, from the parameters that the run starts from, whatever its method is; a
checkpoint holds them, so that a resumed run compares with the same start. Shapes: N records of M members.
"""

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from lowrank.core import sharding
from lowrank.core.typing import Arrays, Batch, PyTree
from lowrank.data.row_format import RECORD
from lowrank.evaluation.evaluate import row_values
from lowrank.objectives.objective import REFERENCE, STORED
from lowrank.training.run import Run


class StoredReference:
    """The reference's values of the records of a run, empty for an objective that stores none."""

    def __init__(self, run: Run) -> None:
        comparison, self._run = run.objective.comparison, run
        self._stored = comparison is not None and comparison.reference == STORED
        size = run.loader.stats["examples"] if self._stored else 0
        self._values_NxM = np.full((size, run.objective.row_format.members), np.nan, np.float32)

    def fill(self, params: PyTree) -> None:
        """Computes the values of the records that the run will see, with `params`; training still starts at its first.

        A record that no batch of the run holds keeps NaN.
        """
        run = self._run
        if not self._stored:
            return
        start = run.loader.get_state()
        for batch in itertools.islice(run.loader, run.config.steps):
            records = batch[RECORD][:, 0]
            if np.isnan(self._values_NxM[records]).any():
                self._values_NxM[records] = row_values(
                    run.objective,
                    run.network,
                    params,
                    batch,
                    bind=run.method.bind,
                    put=run.put,
                    chunk_tokens=run.logits_chunk_tokens,
                )
            if not np.isnan(self._values_NxM).any():
                break
        run.loader.set_state(start)

    def join(self, batch: Batch) -> Batch:
        """The batch with the values of its records."""
        return {**batch, REFERENCE: self._values_NxM[batch[RECORD][:, 0]]} if self._stored else batch

    def arrays(self) -> Arrays:
        """The values as a checkpoint holds them, on every device."""
        if not self._stored:
            return {}
        return {REFERENCE: jax.device_put(self._values_NxM, sharding.replicated_sharding(self._run.mesh))}

    def restore(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Takes the values out of the arrays of a checkpoint, and returns the others."""
        rest = dict(arrays)
        if self._stored:
            self._values_NxM = np.array(rest.pop(REFERENCE))
        return rest
