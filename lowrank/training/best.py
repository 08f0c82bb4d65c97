"""The best evaluation of a run: its step, its score, and the number of later evaluations without a better score.

As in Hugging Face's trainer (`load_best_model_at_end`, `EarlyStoppingCallback`), a score counts as better when it
exceeds the best one so far by more than `min_delta` in its direction.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.training.config import CheckpointConfig


@dataclasses.dataclass
class Best:
    """The best score of a run so far. Without a name in `checkpoint.best` it stays empty."""

    config: CheckpointConfig
    better: Mapping[str, str]  # the better direction of each score, "min" or "max": `Score.better` of the objective
    step: int | None = None  # the step of the best evaluation
    score: float | None = None
    stale: int = 0  # the number of evaluations since then

    @property
    def lower(self) -> bool:
        """Whether a lower score is better."""
        return (self.better[self.config.best] if self.config.mode == "auto" else self.config.mode) == "min"

    @property
    def exhausted(self) -> bool:
        """Whether the run has had `patience` evaluations without a better score, so that it stops."""
        return 0 < self.config.patience <= self.stale

    def update(self, step: int, scores: Mapping[str, float]) -> bool:
        """Records the scores of an evaluation and returns whether they are the best so far. NaN is never the best."""
        if not self.config.best:
            return False
        score = scores[self.config.best]
        gain = 0.0 if self.score is None else (self.score - score if self.lower else score - self.score)
        if score == score and (self.score is None or gain > self.config.min_delta):
            self.step, self.score, self.stale = step, score, 0
            return True
        self.stale += 1
        return False

    def to_meta(self) -> dict[str, Any]:
        """The values that a checkpoint stores as JSON."""
        return {"step": self.step, "score": self.score, "stale": self.stale}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Continues from the values that `to_meta` returned."""
        self.step, self.score, self.stale = meta["step"], meta["score"], meta["stale"]
