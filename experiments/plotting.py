"""The style of all plots of `experiments/`: sizes, colors, intervals and heat maps."""

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008): colors that color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "viridis"
MUTED = "0.6"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
}
DPI = 130
rcParams.update(STYLE)  # for all that the importing process draws


def make_figure(rows: int = 1, columns: int = 1, width: float = 4.8, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, from left to right and then down, each of `width` times `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, whose bytes do not depend on the time."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def draw_forest(
    axes: Axes,
    names: Sequence[str],
    means: Sequence[float],
    halves: Sequence[float],
    at: float | None = None,
    hollow: Sequence[bool] = (),
) -> None:
    """One line for each row, from the top: its mean with its interval, and a vertical line at `at`, if it is given.

    The markers of `hollow` rows are not filled.
    """
    places = range(len(names))
    if at is not None:
        axes.axvline(at, color=MUTED, linewidth=1, zorder=0)
    fills = ["white" if empty else COLORS[0] for empty in hollow] or [COLORS[0]] * len(names)
    for place, mean, half, fill in zip(places, means, _finite(halves), fills, strict=True):
        axes.errorbar(mean, place, xerr=half, fmt=MARKERS[0], color=COLORS[0], markerfacecolor=fill)
    axes.set_yticks(list(places), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def draw_lines(axes: Axes, series: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> None:
    """A line with intervals for each `{name: (x, means, halves)}` over a logarithmic x, with a legend of several."""
    axes.set_xscale("log")
    ticks = sorted({x for xs, _, _ in series.values() for x in xs})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    for i, (name, (x, means, halves)) in enumerate(series.items()):
        look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.errorbar(x, means, yerr=_finite(halves), label=name, linewidth=1.2, **look)
    if len(series) > 1:
        axes.legend()


def _finite(halves: Sequence[float]) -> list[float]:
    """Intervals with a width of 0 where there is none."""
    return [0.0 if math.isnan(half) else half for half in halves]


def draw_heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Values `[rows, columns]` as colors on one scale from `low` to `high`, with a color bar."""
    image = axes.imshow(values, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(visible=False)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)
