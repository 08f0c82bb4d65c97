"""LoRA, DoRA at the same and at half the rank, and full tuning, with the changes in magnitude and in direction.

All of them adapt the kernels of the paper: q, k, v and both of the feed-forward layer, with alpha = 2 r.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import plotting
from experiments.dora import decomposition
from experiments.protocol import measures, paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, row_name
from lowrank.core.paths import AnyPath
from lowrank.sweeps.folder import StudyFolder

TARGET = r"layers/(attn/(q|k|v)|mlp/(up|down))/kernel"
PRINTED = {"LoRA": ("74.7", "77.6"), "DoRA": ("78.4", "79.7"), "DoRA half rank": ("77.5", "80.5")}
SIGNS = {"full": "negative", "LoRA": "positive"}


def row(kind: str, method: Mapping[str, Any], rates: tuple[float, ...]) -> Row:
    """A row with the averages that the paper prints, and the sign of its slope."""
    printed = dict(zip(("Table 1, LLaMA-7B", "Table 1, Llama-2-7B"), PRINTED.get(kind, ()), strict=False))
    if kind in SIGNS:
        printed["Figure 2, slope"] = SIGNS[kind]
    return Row({"method": kind, "rank": str(method.get("rank", "all"))}, {"method": method}, printed, rates)


def rows(rank: int, low: Sequence[float], full: Sequence[float]) -> tuple[Row, ...]:
    """The rows for LoRA's rank; `low` and `full` are the learning rates."""
    adapted = lambda name, r: {"name": name, "rank": r, "alpha": 2.0 * r, "target": TARGET}  # noqa: E731
    return (
        row("LoRA", adapted("lora", rank), tuple(low)),
        row("DoRA", adapted("dora", rank), tuple(low)),
        row("DoRA half rank", adapted("dora", rank // 2), tuple(low)),
        row("full", {"name": "full"}, tuple(full)),
    )


def measure(model: Model) -> dict[str, float]:
    """The mean changes of the query kernels, and the slopes and correlations over the layers."""
    found = decomposition.changes(model)
    numbers = {"magnitude": float(np.mean(found["q"].magnitude)), "direction": float(np.mean(found["q"].direction))}
    numbers |= {f"slope_{kernel}": change.slope for kernel, change in found.items()}
    return numbers | {f"correlation_{kernel}": change.correlation for kernel, change in found.items()}


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes the changes of every trained model."""
    measures.write(experiment, study, results, measure, untrained=False)


HEADINGS = {
    "magnitude": Heading("ΔM of q"),
    "direction": Heading("ΔD of q"),
    "slope_q": Heading("slope, q"),
    "slope_v": Heading("slope, v"),
    "correlation_q": Heading("correlation, q"),
    "correlation_v": Heading("correlation, v"),
}


def plot(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The accuracy, and the slopes of the changes in magnitude over those in direction."""
    figure, panels = plotting.make_figure(columns=3, width=3.6, height=2.2)
    for axes, key, text in zip(panels, KEYS, TEXTS, strict=True):
        means, halves = ([as_number(row[f"{key}_{part}"]) for row in rows] for part in ("mean", "ci95"))
        names = [row_name(experiment, row) if axes is panels[0] else "" for row in rows]
        plotting.draw_forest(axes, names, means, halves, at=None if key == "score" else 0.0)
        axes.set_xlabel(text)
    return plotting.to_png(figure)


KEYS = ("score", "correlation_q", "correlation_v")
TEXTS = ("accuracy", "correlation of ΔM and ΔD, q", "correlation of ΔM and ΔD, v")
EXPERIMENT = Experiment(
    name="dora",
    question="Does DoRA learn more than LoRA, and do its updates resemble those of full tuning?",
    metric="accuracy",
    baseline={"method": "LoRA"},
    small=Size(tasks.topics(), rows(8, (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)), rates=()),
    paper=Size(
        paper_runs.instructions(
            "llama2-7b",
            "tfds:piqa",
            "{goal}\n\nSolution 0: {sol1}\nSolution 1: {sol2}\n\nThe better solution:",
            " {label}",
            steps=3000,
            batch_size=16,
            seq_len=256,
            warmup=100,
        ),
        rows(32, (1e-4, 2e-4, 3e-4), (1e-6, 3e-6, 1e-5)),
        rates=(),
        splits=paper_runs.HELD_OUT_SPLITS,
    ),
    source="arXiv:2402.09353",
    analyze=analyze,
    plot=plot,
    more=functools.partial(measures.markdown, headings=HEADINGS),
)
get_study = EXPERIMENT.get_study
