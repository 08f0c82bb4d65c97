"""The table of the study, as CSV, Markdown and LaTeX, and the differences from LoRA as a plot; from `cells.csv` alone.

A row that is not measured yet is that of `earlier.csv`, the results of an earlier version of the study, and is marked.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plotting
from experiments.methods.rows import ROWS
from experiments.protocol.experiment import Row
from experiments.protocol.marks import EARLIER, earlier_mark, same_mark
from experiments.protocol.record import Line, numbers
from experiments.protocol.row_by_row import Runs
from experiments.protocol.table import EDGE, as_number, compare, conclusion, read_rows
from lowrank.core.files import write_bytes, write_text
from lowrank.sweeps.statistics import interval
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv

COLUMNS = ("method", "family", "task", "seeds", "score_mean", "score_ci95", "trained_params", "step_s", "peak_mb")
COLUMNS += ("adapter_kb", "forgetting", "minus_lora_mean", "minus_lora_ci95", "p_holm", "minus_lora_articles_ci95")
COLUMNS += ("lr", "lr_at_edge", "cores", "earlier")
EARLIER_FILE, LORA = "earlier.csv", "minus_lora"
KNOWN = {"topics": "points of top-1 retrieval lost", "headlines": "rise of perplexity on articles"}
NOTE = f"""± is half of Student's 95 % interval of the mean over the seeds of a row, which draw the new leaves and the
order of the data. It does not cover the choice of the learning rate, nor that of the test articles. The differences
from LoRA are taken seed by seed, with the same interval; {SAME} marks a row that the seeds cannot tell from LoRA (by a
paired t test, corrected by Holm over the rows of a task). "By article" is the interval of the same difference over the
test articles, each with its mean over the seeds: it covers the choice of the articles, and not of the seeds. {EDGE}
marks a rate at an edge of the three that were tried. {EARLIER} marks a row of an earlier version of the study, which
stays until it is measured again: 24 steps, a rate chosen by one seed, three seeds, 193 test articles or 32 headlines,
seconds of two cores, and the difference from the LoRA of that version."""


def table_rows(runs: Mapping[str, Runs], results: Path) -> list[dict[str, Any]]:
    """The rows of both tasks in the order of `ROWS`, those that are not measured yet from `earlier.csv`."""
    path, out = results / EARLIER_FILE, list[dict[str, Any]]()
    earlier = {(row["method"], row["task"]): row for row in (read_rows(path) if path.exists() else [])}
    for task, of in runs.items():
        found = _measured_rows(of)
        for name in (row.name for row in of.rows):
            old = {**_numbers(earlier[name, task]), "earlier": True} if (name, task) in earlier else None
            out += [row for row in (found.get(name, old),) if row]
    return out


def _numbers(line: Line) -> dict[str, Any]:
    """A line of a table with its numbers as such."""
    texts = ("method", "family", "task")
    known = {column: as_number(line[column]) for column in COLUMNS if column in line and column not in texts}
    whole = {column: int(known[column]) for column in ("seeds", "trained_params")}
    return {**{column: line[column] for column in texts}, **dict.fromkeys(COLUMNS[13:], math.nan), **known, **whole}


def _measured_rows(runs: Runs) -> dict[str, dict[str, Any]]:
    """`{method: row}` of a task, of those that are recorded."""
    experiment, lines = runs.task.experiment, runs.all_scored()
    found = {row.name: _measured_row(runs, row, lines[row.name]) for row in runs.rows if row.name in lines}
    if (lora := experiment.baseline["method"]) not in found:
        return found
    scores = [numbers(scored, "score") for scored in lines.values()]
    for name, difference in zip(lines, compare(experiment, [{"method": name} for name in lines], scores), strict=True):
        if name != lora:
            found[name] |= {
                "minus_lora_mean": difference["minus_baseline"],
                "minus_lora_ci95": difference["minus_ci95"],
                "minus_lora_articles_ci95": by_article(lines[name], lines[lora]),
                "p_holm": difference["p_holm"],
            }
    return found


def _measured_row(runs: Runs, row: Row, lines: Sequence[Line]) -> dict[str, Any]:
    scores, rate = list(numbers(lines, "score").values()), runs.rate(row)
    median = lambda column: statistics.median(numbers(lines, column).values())  # noqa: E731
    known = numbers(lines, "known").values()
    assert rate is not None
    return {
        **dict.fromkeys(COLUMNS, math.nan),
        "method": row.name,
        "family": ROWS[row.name].family,
        "task": runs.task.experiment.task,
        "seeds": len(scores),
        **mean_columns("score", scores),
        "trained_params": int(median("trained_params")),
        **{column: median(column) for column in ("step_s", "peak_mb", "adapter_kb")},
        "forgetting": runs.known() - statistics.fmean(known) if known else math.nan,
        "lr": rate["lr"],
        "lr_at_edge": rate["edge"],
        "cores": int(median("cores")),
        "earlier": False,
    }


def by_article(own: Sequence[Line], other: Sequence[Line]) -> float:
    """Half of the 95 % interval of the difference in accuracy over the articles, each with its mean over the seeds."""
    answers = [{line["seed"]: line["right"] for line in lines if line["right"]} for lines in (own, other)]
    seeds = [seed for seed in answers[0] if seed in answers[1]]
    if not seeds:
        return math.nan
    means = [np.mean([[int(each) for each in of[seed]] for seed in seeds], axis=0) for of in answers]
    return interval((means[0] - means[1]).tolist())


def write(runs: Mapping[str, Runs], results: Path) -> str:
    """`table.csv`, `.md` and `.tex`, and a plot for each task, in the results folder; returns the table in Markdown."""
    table = table_rows(runs, results)
    write_csv(results / "table.csv", COLUMNS, table)
    text = markdown(runs, table)
    write_text(results / "table.md", text + "\n")
    write_text(results / "table.tex", latex(table) + "\n")
    for task, of in runs.items():
        if rows := [row for row in table if row["task"] == task and row["method"] != "lora"]:
            write_bytes(results / f"{task}.png", plot(rows, of.task.experiment.metric))
    return text


def markdown(runs: Mapping[str, Runs], table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a README, a part for each task, each with what it took."""
    parts = [_markdown(of, [row for row in table if row["task"] == task]) for task, of in runs.items()]
    return "\n\n".join([" ".join(NOTE.split()), *parts])


def _markdown(runs: Runs, table: Sequence[Mapping[str, Any]]) -> str:
    experiment = runs.task.experiment
    better = "higher" if experiment.get_study("small,rates").better() == "max" else "lower"
    head = (
        "method",
        "family",
        "lr",
        "seeds",
        f"{experiment.metric} ({better} is better)",
        "minus LoRA's",
        "by article",
    )
    lines = [[row["method"], row["family"], *_figures(row)] for row in table]
    title = f"**{experiment.task}** {_cost(runs)}".strip()
    text = markdown_table([*head, *COSTS, KNOWN[experiment.task]], lines, 2)
    new = [{**row, "minus_baseline": row["minus_lora_mean"]} for row in table if not row["earlier"]]
    said = f"\n\n**{conclusion(experiment, new)}**" if any(row["method"] == "lora" for row in new[:-1]) else ""
    return f"{title}\n\n{text}{said}"


COSTS = ("trained", "s/step", "peak MB", "adapter kB")


def _cost(runs: Runs) -> str:
    """What the runs that are recorded took."""
    own = [line for line in runs.record.lines if line["task"] == runs.task.experiment.task and line["seconds"]]
    minutes = sum(float(line["seconds"]) * int(line["cores"]) for line in own) / 60
    return f"{len(own)} runs, {minutes:.0f} minutes of one core." if own else ""


def _figures(row: Mapping[str, Any]) -> list[str]:
    lora, edge = row["method"] == "lora", EDGE if row["lr_at_edge"] is True else ""
    articles = row["minus_lora_articles_ci95"]
    return [
        "" if math.isnan(row["lr"]) else f"{row['lr']:g}{edge}",
        str(row["seeds"]),
        format_mean(row["score_mean"], row["score_ci95"]) + earlier_mark(row),
        "-" if lora else format_mean(row["minus_lora_mean"], row["minus_lora_ci95"]) + same_mark(row, LORA),
        "-" if math.isnan(articles) else f"± {articles:.3f}",
        f"{row['trained_params']:,}",
        f"{row['step_s']:.2f}",
        f"{row['peak_mb']:.0f}",
        f"{row['adapter_kb']:.0f}",
        format_mean(row["forgetting"], math.nan),
    ]


def latex(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a paper, with booktabs."""
    head = ("Method", "Family", "Task", "Rate", "Seeds", "Score", "Minus LoRA's", "By article", "Trained", "s/step")
    body = []
    for row in table:
        rate, seeds, score, minus, articles, *rest = _figures(row)
        numbers = [f"${_in_latex(text)}$" for text in (score, minus, articles)]
        cells = [row["method"], row["family"], row["task"], rate, seeds, *numbers, *rest]
        body.append(" & ".join(cells).replace("_", r"\_").replace(",", "{,}") + r" \\")
    lines = [r"\begin{tabular}{lll" + "r" * 10 + "}", r"\toprule"]
    lines += [" & ".join((*head, "Peak MB", "kB", "Forgetting")) + r" \\", r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"])


def _in_latex(text: str) -> str:
    for mark, command in (("±", r"\pm"), (SAME, r"\approx"), (EARLIER, r"\dagger")):
        text = text.replace(mark, command)
    return text


def plot(rows: Sequence[Mapping[str, Any]], metric: str) -> bytes:
    """The difference from LoRA of each row with its interval, hollow where tied, as PNG."""
    figure, [axes] = plotting.make_figure(width=6.4, height=0.8 + 0.2 * len(rows))
    names = [row["method"] + earlier_mark(row) for row in rows]
    means, halves = ([row[f"minus_lora_{part}"] for row in rows] for part in ("mean", "ci95"))
    plotting.draw_forest(axes, names, means, halves, 0.0, [bool(same_mark(row, LORA)) for row in rows])
    axes.set_xlabel(f"{metric} minus LoRA's, seed by seed")
    return plotting.to_png(figure)
