"""The table of the study, as CSV, Markdown and LaTeX, and accuracy against parameters as a plot; from cells alone."""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.study.compute_cost import cost_summary
from experiments.study.numbers import format_mean, interval, write_csv
from experiments.study.stages import final_cells
from experiments.study.study import Study
from experiments.study.tasks import TASKS, Task
from experiments.study.timing import Timing
from lowrank.core.files import write_bytes, write_text

COLUMNS = ("method", "family", "task", "seeds", "score_mean", "score_ci95", "trained_params", "step_s", "peak_mb")
COLUMNS += ("adapter_kb", "forgetting")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def rows(study: Study, known: Callable[[Task], float]) -> list[dict[str, Any]]:
    """One row for each method and task whose scores are done, NaN for what is not timed yet.

    `known`: what a task's untrained model knows.
    """
    out = []
    for task in TASKS.values():
        for name, row in study.rows.items():
            cells = [cell.read() for cell in final_cells(study, task, name)] if task.name in row.tasks else []
            timing = Timing(study, task, name).read() or {"step_s": math.nan, "peak_mb": math.nan}
            if cells and all("test" in (cell or {}) for cell in cells):
                out.append(_row(task, name, row.family, cells, timing, known(task)))
    return out


def _row(
    task: Task, name: str, family: str, cells: Sequence[Mapping[str, Any]], timing: Mapping[str, Any], known: float
) -> dict[str, Any]:
    scores = [cell["test"] for cell in cells]
    return {
        "method": name,
        "family": family,
        "task": task.name,
        "seeds": len(scores),
        "score_mean": statistics.mean(scores),
        "score_ci95": interval(scores),
        "trained_params": cells[0]["trained_params"],
        "step_s": timing["step_s"],
        "peak_mb": timing["peak_mb"],
        "adapter_kb": cells[0]["adapter_kb"],
        "forgetting": known - statistics.mean(cell["known"] for cell in cells),
    }


def write(study: Study, table: Sequence[Mapping[str, Any]]) -> None:
    """`table.csv`, `table.md`, `table.tex` and `accuracy.png` in the results folder."""
    write_csv(study.results / "table.csv", COLUMNS, table)
    write_text(study.results / "table.md", markdown(study, table) + "\n")
    write_text(study.results / "table.tex", latex(table) + "\n")
    if table:
        write_bytes(study.results / "accuracy.png", plot(table))


def markdown(study: Study, table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a README, a part for each task, each with what it took."""
    return "\n\n".join(_markdown(study, task, [r for r in table if r["task"] == task.name]) for task in TASKS.values())


def _markdown(study: Study, task: Task, table: Sequence[Mapping[str, Any]]) -> str:
    arrow = "higher" if task.sign > 0 else "lower"
    head = ("method", "family", f"{task.metric} ({arrow} is better)", "trained", "s/step", "peak MB", "adapter kB")
    lines = [[*head, task.knowledge], ["---", "---", *["---:"] * 6]]
    lines += [_cells(row) for row in table]
    title = f"**{task.name}** {cost_summary(study, task, [row['method'] for row in table])}".strip()
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"],
        row["family"],
        format_mean(row["score_mean"], row["score_ci95"]),
        f"{row['trained_params']:,}",
        "-" if math.isnan(row["step_s"]) else f"{row['step_s']:.2f}",
        "-" if math.isnan(row["peak_mb"]) else f"{row['peak_mb']:.0f}",
        f"{row['adapter_kb']:.0f}",
        f"{row['forgetting']:.2f}",
    ]


def latex(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a paper, with booktabs."""
    head = " & ".join(("Method", "Family", "Task", "Score", "Trained", "s/step", "Peak MB", "kB", "Forgetting"))
    body = []
    for row in table:
        method, family, score, *rest = _cells(row)
        cells = [method, family, row["task"], f"${score.replace('±', chr(92) + 'pm')}$", *rest]
        body.append(" & ".join(cells).replace("_", r"\_").replace(",", "{,}") + r" \\")
    return "\n".join(
        [r"\begin{tabular}{lllrrrrrr}", r"\toprule", head + r" \\", r"\midrule", *body, r"\bottomrule"]
    ) + ("\n\\end{tabular}")


def plot(table: Sequence[Mapping[str, Any]]) -> bytes:
    """Score against trained parameters, a panel for each task, as PNG."""
    tasks = [task for task in TASKS.values() if any(row["task"] == task.name for row in table)]
    figure = Figure(figsize=(7.2 * len(tasks), 4.8), dpi=130, layout="constrained")
    colors = dict(zip(dict.fromkeys(row["family"] for row in table), COLORS, strict=False))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in table if row["task"] == task.name):
            x, y, color = row["trained_params"], row["score_mean"], colors[row["family"]]
            spread = None if math.isnan(row["score_ci95"]) else row["score_ci95"]
            axes.errorbar(x, y, yerr=spread, fmt="o", color=color, capsize=2, ms=4, lw=1)
            axes.annotate(row["method"], (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set_xscale("log")
        axes.set(xlabel="trained parameters", ylabel=task.metric, title=task.name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
