"""The settings of long-context scores."""

import dataclasses
from collections.abc import Sequence

from lowrank.core.errors import UserError, plural, unknown
from lowrank.evaluation.long_context.retrieval import TASKS

SLIDING, POSITIONS, PRICE = "sliding", "positions", "price"
SCORES = (SLIDING, POSITIONS, PRICE, *TASKS)
REPEATED, DATA = "repeated", "data"
FILLERS = (REPEATED, DATA)


@dataclasses.dataclass(frozen=True)
class LongConfig:
    """The group `eval.long` of a config: how long texts are scored.

    lengths: the tokens of retrieval's prompts; (): an eighth, a quarter, a half and the whole of the context.
    depths: where in a prompt the answer stands, from 0, its start, to 1. samples: prompts of each length and depth.
    filler: the text around a pass key: the five sentences of its paper, `repeated`, or the held-out texts, `data`.
    window: the tokens of a window of texts; 0: the context. stride: how far it moves on; 0: a quarter of it.
    tokens: so many tokens of the held-out texts are scored; 0: all. join: texts are scored as one after the other, each
      seeing the ones before it, as texts are when they are shorter than the context; else each alone.
    bins: rows of the table of perplexity by position. seed: of the prompts.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    filler: str = REPEATED
    window: int = 0
    stride: int = 0
    tokens: int = 0
    join: bool = True
    bins: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "bins": 1, "window": 0, "stride": 0, "tokens": 0, "seed": 0}.items():
            if (given := getattr(self, name)) < least:
                raise UserError(f"eval.long.{name}={given} is below {least}: set it to {least} or more")
        if self.filler not in FILLERS:
            raise unknown("eval.long.filler", self.filler, FILLERS)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"eval.long.depths={self.depths} must be numbers in [0, 1]: 0 is the start of a prompt")

    def of_context(self, context: int) -> "LongConfig":
        """The settings of a model with this context, none of them left open.

        Raises UserError for lengths and windows that are longer.
        """
        lengths = tuple(self.lengths) or tuple(n for n in (context // 8, context // 4, context // 2, context) if n)
        window = self.window or context
        for name, length in [*(("lengths", n) for n in lengths), ("window", window)]:
            if not 1 < length <= context:
                has = f"the model has {plural(context, 'position')}"
                raise UserError(f"eval.long.{name} has {length}, and {has}: set it to 2..{context}")
        stride = self.stride or max(1, window // 4)
        if stride > window:
            raise UserError(f"eval.long.stride={stride} exceeds eval.long.window={window}: it would skip tokens")
        return dataclasses.replace(self, lengths=lengths, window=window, stride=stride)


def check_scores(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no long-context score."""
    for name in names:
        if name not in SCORES:
            raise unknown("long-context score", name, SCORES)
