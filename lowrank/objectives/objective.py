"""An objective is a value: the contents of a batch, the loss as a sum and its weight, and the scores of held-out data.

Shapes: B rows of a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from lowrank.core.typing import Batch, BatchInfo, HostArrays, Network, PyTree, Sums
from lowrank.data import RowFormat
from lowrank.generation.sampling import Sampling
from lowrank.objectives.rewards import Sample


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


class Observe(Protocol):
    """`Comparison.row_values` of a batch, without a gradient: of the model as it is, or of the start of the run."""

    def __call__(self, batch: Batch, of_start: bool = False) -> jax.Array:
        """The values of the rows."""


RowValues = Callable[[Network, PyTree, Batch, int], jax.Array]  # as `LossFunction` -> `[B, ...]` float32
Prepare = Callable[[Observe, Batch], Mapping[str, jax.Array]]  # a whole batch -> arrays `[B, ...]` that are added to it
ScoreSums = Callable[[Network, PyTree, Batch, int], PyTree]  # as `LossFunction`, and inside a program -> sums
Summarize = Callable[[PyTree], dict[str, float]]  # the sums of all batches (NumPy, 64 bits) -> scores by name
ScoreTexts = Callable[[Sequence[str], Sequence[str]], dict[str, float]]  # (texts, references) -> scores by name
ReadBatchInfo = Callable[[Batch], BatchInfo]
CheckModel = Callable[[str, Any], None]  # (model's name, its config); raises UserError for a model that is unfit
ModelOptions = Callable[[Sequence[str]], Mapping[str, Any]]  # names of the classes -> fields of the model's config


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The scores of held-out batches: sums over each batch, and the scores that the sums of all batches give."""

    sums: ScoreSums
    summarize: Summarize  # raises UserError where nothing can be scored
    better: Mapping[str, str]  # "min" or "max" by the name of each score that may choose the best checkpoint


REFERENCE = "reference"  # the array of a batch with the values of its rows at the start of the run
STORED, COPIED = "stored", "copied"


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What a loss compares the model with, and what it takes from a whole batch before the microbatches.

    The reference is the model that the run starts from, whatever its method. Where it is `STORED`, its values of each
    record are computed once, before step 1, and are in the batch as `REFERENCE`, by the record's number. Where it is
    `COPIED`, a copy of the trained leaves at their start computes them in each step.
    """

    row_values: RowValues
    reference: str = ""  # STORED, COPIED, or empty for losses without a reference
    prepare: Prepare = lambda observe, batch: {}


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """Texts that the model writes to the prompts of a batch, and what the loss reads of them.

    The texts of a batch of a training run depend on nothing but the parameters, the prompts, the run's seed and the
    step. Every process of a run writes and judges all of them; the rewards of the first one count.
    """

    max_new: int  # at most this many tokens
    sampling: Sampling
    judge: Callable[[Sequence[Sample]], HostArrays]  # texts -> arrays `[B]` of a batch; raises UserError
    compare: Callable[[HostArrays], HostArrays]  # a judged batch -> arrays `[B]` that compare the texts of each prompt
    updates: int = 1  # steps that learn from the same texts
    old: str = ""  # the array with `Comparison.row_values` when the texts were written; "": none, as a step is the only


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One training objective. The rest of the code asks this value, and looks at no name and no keys of a batch."""

    row_format: RowFormat  # the arrays of a batch, and the encoder that makes them of records
    loss: LossFunction  # the loss that is differentiated
    row_sums: RowSums  # the same loss row by row, for objectives that compare rows
    batch_info: ReadBatchInfo  # the part of a batch that methods may read
    score: Score
    check_model: CheckModel
    vocabulary_logits: bool  # whether the loss computes logits over the vocabulary, which `chunk_tokens` can cut
    model_options: ModelOptions = lambda labels: {}
    trainable: tuple[str, ...] = ()  # regexes over leaves that are trained with every method, such as a new head
    score_texts: ScoreTexts | None = None  # None: no texts are generated
    comparison: Comparison | None = None  # None: the loss looks at a microbatch alone
    rollout: Rollout | None = None  # None: the batches of the loader are complete
    on_features: "Objective | None" = None  # the same loss of pooled features `[B, D]`; None: it needs every token
