"""The table of the study: every base before tuning and with what was tuned on it, and the scores as plots.

A row that is not measured yet is that of `earlier.csv`, the results of an earlier version of the study, and is marked.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.protocol.experiment import Experiment, Row
from experiments.protocol.marks import EARLIER, earlier_mark, is_earlier, same_mark
from experiments.protocol.record import Line, numbers
from experiments.protocol.row_by_row import Runs
from experiments.protocol.table import as_number, compare, is_higher_better, read_rows
from experiments.quantization.bases import bits_under, find
from experiments.quantization.rows import BASES, ROWS
from lowrank.core.files import write_bytes, write_text
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv

COLUMNS = ("base", "method", "task", "seeds", "bits_per_weight", "bits_on_disk", "score_mean", "score_ci95", "step_s")
COLUMNS += ("peak_mb", "minus_float32_mean", "minus_float32_ci95", "p_holm", "lr", "earlier")
NAMES, EARLIER_FILE, UNTUNED, FLOAT32 = ("base", "method", "task"), "earlier.csv", "none", "minus_float32"
NOTE = f"""± is half of Student's 95 % interval of the mean over the seeds. Differences are from LoRA on float32, seed
by seed; {SAME} marks a row that the seeds cannot tell from it (by a paired t test, corrected by Holm over the rows of a
task). {EARLIER} marks a row of an earlier version of the study, which stays until it is measured again: three seeds,
193 test articles, or 64 headlines after 20 steps of 8 rows, and seconds of two cores."""


def table_rows(runs: Mapping[str, Runs], results: Path) -> list[dict[str, Any]]:
    """The rows of both tasks: bases untuned, which have one deterministic score, then what is tuned on them."""
    path, out = results / EARLIER_FILE, list[dict[str, Any]]()
    earlier = {tuple(row[name] for name in NAMES): _numbers(row) for row in (read_rows(path) if path.exists() else [])}
    for task, of in runs.items():
        found = {**_untuned(of), **_tuned(of)}
        names = [(base, UNTUNED) for base in BASES] + [tuple(row.labels.values()) for row in of.rows]
        out += [row for name in names for row in (found.get(name, earlier.get((*name, task))),) if row]
    return out


def _numbers(line: Line) -> dict[str, Any]:
    """A row of `earlier.csv` with its numbers as such."""
    known = {column: as_number(line[column]) for column in COLUMNS if column in line and column not in NAMES}
    whole = {"seeds": int(known["seeds"]), "earlier": True}
    return {**dict.fromkeys(COLUMNS, math.nan), **{name: line[name] for name in NAMES}, **known, **whole}


def _untuned(runs: Runs) -> dict[tuple[str, ...], dict[str, Any]]:
    """`{(base, none): row}` of the bases that are measured."""
    found = {}
    for base in BASES:
        if line := find(runs, base):
            bits = {column: float(line[column]) for column in ("bits_per_weight", "bits_on_disk")}
            facts = {"base": base, "method": UNTUNED, "task": line["task"], "seeds": 1, "earlier": False}
            row = {**dict.fromkeys(COLUMNS, math.nan), **facts, **bits, "score_mean": float(line["score"])}
            found[base, UNTUNED] = row
    return found


def _tuned(runs: Runs) -> dict[tuple[str, ...], dict[str, Any]]:
    """`{(base, method): row}` of what is recorded."""
    experiment, lines = runs.task.experiment, runs.all_scored()
    rows = [row for row in runs.rows if row.name in lines]
    found = {tuple(row.labels.values()): _tuned_row(runs, row, lines[row.name]) for row in rows}
    if (baseline := tuple(experiment.baseline.values())) not in found:
        return found
    compared = compare(experiment, [row.labels for row in rows], [numbers(of, "score") for of in lines.values()])
    for name, difference in zip(found, compared, strict=True):
        if name != baseline:
            found[name] |= {
                "minus_float32_mean": difference["minus_baseline"],
                "minus_float32_ci95": difference["minus_ci95"],
                "p_holm": difference["p_holm"],
            }
    return found


def _tuned_row(runs: Runs, row: Row, lines: Sequence[Line]) -> dict[str, Any]:
    scores, rate, base = list(numbers(lines, "score").values()), runs.rate(row), find(runs, row.labels["base"])
    assert rate is not None
    in_file = base is not None and ROWS[row.name].model == BASES[row.labels["base"]]  # else the method makes the codes
    return {
        **dict.fromkeys(COLUMNS, math.nan),
        **row.labels,
        "task": runs.task.experiment.task,
        "seeds": len(scores),
        "bits_per_weight": bits_under(runs.config(row)),
        "bits_on_disk": float(base["bits_on_disk"]) if base and in_file else math.nan,
        **mean_columns("score", scores),
        **{column: statistics.median(numbers(lines, column).values()) for column in ("step_s", "peak_mb")},
        "lr": rate["lr"],
        "earlier": False,
    }


def write(runs: Mapping[str, Runs], results: Path) -> str:
    """`table.csv`, `table.md` and a plot for each task in the results folder; returns the table in Markdown."""
    table = table_rows(runs, results)
    write_csv(results / "table.csv", COLUMNS, table)
    text = markdown(runs, table)
    write_text(results / "table.md", text + "\n")
    for task, of in runs.items():
        if rows := [row for row in table if row["task"] == task]:
            write_bytes(results / f"{task}.png", plot(rows, of.task.experiment))
    return text


def markdown(runs: Mapping[str, Runs], table: Sequence[Mapping[str, Any]]) -> str:
    """The table for a README, a part for each task."""
    parts = [" ".join(NOTE.split())]
    for task, of in runs.items():
        head = ("base", "method", "bits", "on disk", "seeds", "score", "minus float32 + LoRA", "s/step", "peak MB")
        text = markdown_table(head, [_cells(row) for row in table if row["task"] == task], 2)
        parts.append(f"**{task}** ({of.task.experiment.metric})\n\n{text}")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    number = lambda key, form: "-" if math.isnan(row[key]) else format(row[key], form)  # noqa: E731
    difference = format_mean(row["minus_float32_mean"], row["minus_float32_ci95"])
    return [
        row["base"],
        row["method"],
        number("bits_per_weight", ".2f"),
        number("bits_on_disk", ".2f"),
        str(row["seeds"]),
        format_mean(row["score_mean"], row["score_ci95"]) + earlier_mark(row),
        difference + same_mark(row, FLOAT32) or "-",
        number("step_s", ".2f"),
        number("peak_mb", ".0f"),
    ]


def plot(rows: Sequence[Mapping[str, Any]], experiment: Experiment) -> bytes:
    """The score of each row with its interval, hollow for a row of an earlier version, as PNG."""
    figure, [axes] = plotting.make_figure(width=6.4, height=0.8 + 0.2 * len(rows))
    if not is_higher_better(experiment):  # perplexities, of which the largest are of broken models
        axes.set_xscale("log")
    names = [f"{row['base']} + {row['method']}, {row['bits_per_weight']:.1f} bits" for row in rows]
    scores = [[row[f"score_{part}"] for row in rows] for part in ("mean", "ci95")]
    plotting.draw_forest(axes, names, *scores, hollow=[is_earlier(row) for row in rows])
    axes.set_xlabel(experiment.metric)
    return plotting.to_png(figure)
