"""The held-out score of a model in a folder, by which `launch.combine` selects the members of a soup."""

from collections.abc import Callable
from pathlib import Path

from lowrank.core import config_file
from lowrank.core.errors import UserError, unknown
from lowrank.merging.recipe import Score
from lowrank.objectives import build_objective
from lowrank.training.build import build_run

SIGNS = {"max": 1.0, "min": -1.0}


def scorer(group: Score) -> Callable[[Path], float]:
    """`score(folder)`, higher is better, by the objective and the held-out split of a run's config.

    Without a `metric` it is the first score of the objective. Raises UserError for a config that cannot be read, for a
    score that the objective lacks, and where neither the group nor the config names a split.
    """
    config = config_file.load_config(group["config"])
    better = build_objective(config.get("objective", "causal_lm")).score.better
    metric = group.get("metric") or next(iter(better))
    if metric not in better:
        raise unknown("metric of score", metric, better)
    split = group.get("split") or config.get("eval", {}).get("split")
    if not split:
        raise UserError(f"score has no split, and {group['config']} sets no eval.split: name the held-out split")
    changes = {"eval.split": split, "eval.texts": 0, "eval.every": 0, "method": {"name": "full"}, "loggers": []}
    if "max_examples" in group:
        changes["eval.max_examples"] = group["max_examples"]

    def score(folder: Path) -> float:
        run = build_run(config_file.with_changes(config, {**changes, "model.name": str(folder)}))
        assert run.scorer is not None
        return SIGNS[better[metric]] * run.scorer.scores(run.load().params)[metric]

    return score
