"""The plot of a study that has no other: a line for each row."""

import math
from collections.abc import Mapping, Sequence

from experiments import plotting
from experiments.protocol.experiment import Experiment
from experiments.protocol.table import as_number, baseline_name, is_baseline, row_name
from lowrank.sweeps.statistics import is_tied


def plot_rows(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The score of every row with its interval, and its difference from the baseline, hollow where tied, as PNG."""
    names = [row_name(experiment, row) for row in rows]
    figure, (scores, differences) = plotting.make_figure(columns=2, height=0.8 + 0.28 * len(rows))
    numbers = lambda key: [as_number(row[key]) for row in rows]  # noqa: E731
    baseline = next(as_number(row["score_mean"]) for row in rows if is_baseline(experiment, row))
    plotting.draw_forest(scores, names, numbers("score_mean"), numbers("score_ci95"), at=baseline)
    tied = [is_tied(as_number(row["p_holm"])) for row in rows]
    plotting.draw_forest(differences, [""] * len(rows), numbers("minus_baseline"), numbers("minus_ci95"), 0.0, tied)
    scores.set_xlabel(experiment.metric)
    differences.set_xlabel(f"minus {baseline_name(experiment)}, seed by seed")
    return plotting.to_png(figure)


def draw_ranges(names: Sequence[str], ranges: Sequence[tuple[float, float, float]], label: str) -> bytes:
    """`(middle, low, high)` of every row on a logarithmic axis with base 2, as PNG; NaN leaves a row empty."""
    figure, [axes] = plotting.make_figure(width=6.4, height=0.8 + 0.28 * len(names))
    known = [(place, *of) for place, of in enumerate(ranges) if not any(map(math.isnan, of))]
    for place, middle, low, high in known:
        look = {"fmt": plotting.MARKERS[0], "color": plotting.COLORS[0]}
        axes.errorbar([middle], [place], xerr=[[middle - low], [high - middle]], **look)
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    if known:  # an axis without a value cannot be logarithmic
        axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    return plotting.to_png(figure)
