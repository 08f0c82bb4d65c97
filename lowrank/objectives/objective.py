"""An objective is a value: the contents of a batch, the loss as a sum and its weight, and the scores of held-out data.

Shapes: B rows of a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.data import RowFormat


class LossFunction(Protocol):
    """The loss of a batch."""

    def __call__(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> Sums:
        """The weighted losses, summed over the batch, their weight, and sums of named metrics.

        `chunk_tokens` is about how many tokens have their logits in memory at a time; 0: all of the batch's.
        """


class RowSums(Protocol):
    """The loss of each row."""

    def __call__(
        self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int
    ) -> tuple[jax.Array, jax.Array]:
        """`(weighted losses, weights)` float32 `[B]`, summed over each row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The scores of held-out batches."""

    # (network, bound params, batch, chunk_tokens) -> sums over the batch, a tree of arrays; called inside a program
    sums: Callable[[Network, PyTree, Batch, int], PyTree]
    # the sums of all batches (NumPy, 64 bits) -> scores by name; raises UserError where there is nothing to score
    summarize: Callable[[PyTree], dict[str, float]]
    # name of a score -> "min" or "max", its better end, for the scores that may choose the best checkpoint
    better: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One training objective. The rest of the code asks this value and never looks at a name or a batch's keys."""

    row_format: RowFormat  # the arrays of a batch, and the encoder that makes them of records
    loss: LossFunction  # the loss that is differentiated
    row_sums: RowSums  # the same loss row by row, for objectives that compare rows
    batch_info: Callable[[Batch], BatchInfo]  # the part of a batch that methods may read
    score: Score  # the scores of held-out batches
    check_model: Callable[[str, Any], None]  # (model's name, model's config) -> raises UserError where it is unfit
    vocabulary_logits: bool  # whether the loss computes logits over the vocabulary, which `chunk_tokens` can cut
    # names of the classes -> options of the model's config
    model_options: Callable[[Sequence[str]], Mapping[str, Any]] = lambda labels: {}
    trainable: tuple[str, ...] = ()  # regexes over leaves that are trained with every method: a new head
    # (generated texts, references) -> scores by name; None: no texts are generated
    score_texts: Callable[[Sequence[str], Sequence[str]], dict[str, float]] | None = None
    # the same objective for batches in which a method has put pooled features `[B, D]` in place of tokens; None: it
    # needs every token
    on_features: "Objective | None" = None
