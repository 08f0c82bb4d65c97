"""The table of the study, as CSV, Markdown and LaTeX, and accuracy against parameters as a plot; from cells alone."""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.study.compute_cost import cost_summary
from experiments.study.numbers import EARLIER, earlier_mark, same_mark
from experiments.study.stages import ScoredCells, is_earlier, scored_cells
from experiments.study.study import Study
from experiments.study.tasks import TASKS, Task
from experiments.study.timing import Timing
from lowrank.core.files import write_bytes, write_text
from lowrank.sweeps.statistics import interval, paired_difference
from lowrank.sweeps.tables import SAME, format_mean, write_csv

COLUMNS = ("method", "family", "task", "seeds", "score_mean", "score_ci95", "trained_params", "step_s", "peak_mb")
COLUMNS += ("adapter_kb", "forgetting", "minus_lora_mean", "minus_lora_ci95", "earlier_formulas")
NOTE = f"""± is half of Student's 95 % interval of the mean over the seeds of a row, which draw the new leaves and the
order of the data. It does not cover the choice of the learning rate, which one seed makes, nor that of the test
articles. The differences from LoRA are taken seed by seed, with the same interval. {SAME} marks a row whose interval
covers 0 or has no width, so that these few seeds cannot tell it from LoRA. {EARLIER} marks a row that was not run
again after the formulas of its method changed."""
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def rows(study: Study, known: Callable[[Task], float]) -> list[dict[str, Any]]:
    """One row for each method and task whose scores are done, NaN for what is not timed yet.

    `known`: what a task's untrained model knows.
    """
    out = []
    for task in TASKS.values():
        lora = scored_cells(study, task, "lora")
        for name, row in study.rows.items():
            timing = Timing(study, task, name).read() or {"step_s": math.nan, "peak_mb": math.nan}
            if cells := scored_cells(study, task, name):
                found = _row(task, name, row.family, [numbers for _, numbers in cells], timing, known(task))
                out.append(
                    found | _difference(cells, lora if name != "lora" else []) | {"earlier_formulas": is_earlier(cells)}
                )
    return out


def _difference(cells: ScoredCells, lora: ScoredCells) -> dict[str, float]:
    """The mean of the differences of scores from LoRA's at the same seed, with its interval; NaN without a pair."""
    scores, reference = ({cell.seed: numbers["test"] for cell, numbers in of} for of in (cells, lora))
    found = paired_difference(scores, reference)
    return {"minus_lora_mean": found.mean, "minus_lora_ci95": found.half}


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
    parts = [_markdown(study, task, [r for r in table if r["task"] == task.name]) for task in TASKS.values()]
    return "\n\n".join([NOTE, *parts])


def _markdown(study: Study, task: Task, table: Sequence[Mapping[str, Any]]) -> str:
    arrow = "higher" if task.sign > 0 else "lower"
    head = ("method", "family", f"{task.metric} ({arrow} is better)", "minus LoRA's", "trained", "s/step", "peak MB")
    lines = [[*head, "adapter kB", task.knowledge], ["---", "---", *["---:"] * 7]]
    lines += [_cells(row) for row in table]
    title = f"**{task.name}** {cost_summary(study, task, [row['method'] for row in table])}".strip()
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"],
        row["family"],
        format_mean(row["score_mean"], row["score_ci95"]) + earlier_mark(row),
        "-"
        if row["method"] == "lora"
        else format_mean(row["minus_lora_mean"], row["minus_lora_ci95"]) + same_mark(row),
        f"{row['trained_params']:,}",
        "-" if math.isnan(row["step_s"]) else f"{row['step_s']:.2f}",
        "-" if math.isnan(row["peak_mb"]) else f"{row['peak_mb']:.0f}",
        f"{row['adapter_kb']:.0f}",
        f"{row['forgetting']:.2f}",
    ]


def _minus_lora(row: Mapping[str, Any]) -> str:
    difference = format_mean(row["minus_lora_mean"], row["minus_lora_ci95"])
    return "-" if row["method"] == "lora" else difference + same_mark(row)


def latex(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a paper, with booktabs."""
    head = " & ".join(
        ("Method", "Family", "Task", "Score", "Minus LoRA's", "Trained", "s/step", "Peak MB", "kB", "Forgetting")
    )
    body = []
    for row in table:
        method, family, score, minus, *rest = _cells(row)
        cells = [method, family, row["task"], *(f"${_in_latex(text)}$" for text in (score, minus)), *rest]
        body.append(" & ".join(cells).replace("_", r"\_").replace(",", "{,}") + r" \\")
    return "\n".join(
        [r"\begin{tabular}{lllrrrrrrr}", r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body, r"\bottomrule"]
    ) + ("\n\\end{tabular}")


def _in_latex(text: str) -> str:
    for mark, command in (("±", r"\pm"), (SAME, r"\approx"), (EARLIER, r"\dagger")):
        text = text.replace(mark, command)
    return text


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
