"""The plot of a study that has no other: a line for each row."""

from collections.abc import Mapping, Sequence

from experiments import plotting
from experiments.protocol.experiment import Experiment
from experiments.protocol.table import as_number, baseline_name, is_baseline, row_name


def plot_rows(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The score of every row with its interval, and its difference from the baseline, as PNG."""
    names = [row_name(experiment, row) for row in rows]
    figure, (scores, differences) = plotting.make_figure(columns=2, height=0.8 + 0.28 * len(rows))
    numbers = lambda key: [as_number(row[key]) for row in rows]  # noqa: E731
    baseline = next(as_number(row["score_mean"]) for row in rows if is_baseline(experiment, row))
    plotting.draw_forest(scores, names, numbers("score_mean"), numbers("score_ci95"), at=baseline)
    plotting.draw_forest(differences, [""] * len(rows), numbers("minus_baseline"), numbers("minus_ci95"), at=0.0)
    scores.set_xlabel(experiment.metric)
    differences.set_xlabel(f"minus {baseline_name(experiment)}, seed by seed")
    return plotting.to_png(figure)
