"""The table of the study: every base before tuning and with what was tuned on it, and score against bits as a plot."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.quantization.bases import bits_under, measured
from experiments.quantization.rows import BASES
from experiments.study.numbers import EARLIER, earlier_mark
from experiments.study.stages import is_earlier, scored_cells
from experiments.study.study import Study
from experiments.study.tasks import TASKS
from experiments.study.timing import Timing
from lowrank.core.files import write_bytes, write_text
from lowrank.sweeps.statistics import interval
from lowrank.sweeps.tables import format_mean, write_csv

COLUMNS = ("base", "method", "task", "seeds", "bits_per_weight", "bits_on_disk", "score_mean", "score_ci95", "step_s")
COLUMNS += ("peak_mb", "earlier_formulas")


def rows(study: Study, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Two kinds of rows: a base untuned (one deterministic score), and a row of the study whose scores are done.

    What is not timed yet is NaN.
    """
    out = []
    for task in tasks:
        out += [_untuned(study, task, base) for base in BASES]
        for name in study.rows:
            timing = Timing(study, TASKS[task], name).read() or {"step_s": math.nan, "peak_mb": math.nan}
            if cells := scored_cells(study, TASKS[task], name):
                found = _tuned(study, task, name, [numbers for _, numbers in cells], timing)
                out.append(found | {"earlier_formulas": is_earlier(cells)})
    return out


def _untuned(study: Study, task: str, base: str) -> dict[str, Any]:
    found = measured(study, TASKS[task], base)
    bits = {"bits_per_weight": found["bits_in_memory"], "bits_on_disk": found["bits_on_disk"]}
    score = {"score_mean": found["score"], "score_ci95": math.nan, "step_s": math.nan, "peak_mb": math.nan}
    score |= {"earlier_formulas": False}
    return {"base": base, "method": "none", "task": task, "seeds": 1, **bits, **score}


def _tuned(
    study: Study, task: str, name: str, cells: Sequence[Mapping[str, Any]], timing: Mapping[str, Any]
) -> dict[str, Any]:
    base, _, method = name.partition("+")
    scores = [cell["test"] for cell in cells]
    numbers = {"seeds": len(scores), "score_mean": statistics.mean(scores), "score_ci95": interval(scores)}
    numbers |= {k: timing[k] for k in ("step_s", "peak_mb")}
    row, model = study.rows[name], dict(TASKS[task].settings["model"])
    numbers["bits_per_weight"] = bits_under(row, model.pop("name"), model)
    if row.model != BASES[base]:  # the method makes the codes, and no file holds them
        numbers["bits_on_disk"] = math.nan
    return {**_untuned(study, task, base), "method": method, **numbers}


def write(study: Study) -> None:
    """`table.csv`, `table.md` and `bits.png` in the results folder."""
    table = rows(study, list(TASKS))
    write_csv(study.results / "table.csv", COLUMNS, table)
    write_text(study.results / "table.md", markdown(table) + "\n")
    write_bytes(study.results / "bits.png", plot(table))


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a README, a part for each task."""
    parts = [f"{EARLIER} marks a row that was not run again after the formulas of its method changed."]
    for task in TASKS.values():
        lines = [
            f"**{task.name}** ({task.metric})",
            "",
            "| base | method | bits | on disk | score | s/step | peak MB |",
        ]
        lines += ["|---|---|---:|---:|---:|---:|---:|"]
        lines += [_line(row) for row in table if row["task"] == task.name]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    cost = ["-", "-"] if math.isnan(row["step_s"]) else [f"{row['step_s']:.2f}", f"{row['peak_mb']:.0f}"]
    on_disk = "-" if math.isnan(row["bits_on_disk"]) else f"{row['bits_on_disk']:.2f}"
    cells = [row["base"], row["method"], f"{row['bits_per_weight']:.2f}", on_disk]
    score = format_mean(row["score_mean"], row["score_ci95"]) + earlier_mark(row)
    return "| " + " | ".join([*cells, score, *cost]) + " |"


def plot(table: Sequence[Mapping[str, Any]]) -> bytes:
    """Score against bits a weight, untuned and tuned, a panel for each task, as PNG."""
    figure = Figure(figsize=(7.2 * len(TASKS), 4.6), dpi=130, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS), squeeze=False)[0], TASKS.values(), strict=True):
        for method in dict.fromkeys(row["method"] for row in table):
            found = [row for row in table if row["task"] == task.name and row["method"] == method]
            x, y = [row["bits_per_weight"] for row in found], [row["score_mean"] for row in found]
            axes.plot(x, y, "o", ms=4, label=method)
            for row in found:
                axes.annotate(row["base"], (row["bits_per_weight"], row["score_mean"]), fontsize=6)
        axes.set(xscale="log", xlabel="bits a weight", ylabel=task.metric, title=task.name)
        axes.set_yscale("linear" if task.sign > 0 else "log")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
