"""The table of a study, a row for the seeds of each point: as CSV, Markdown and LaTeX with booktabs."""

import collections
import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowrank.core.errors import plural
from lowrank.core.files import write_text
from lowrank.core.paths import AnyPath
from lowrank.sweeps import claims
from lowrank.sweeps.cells import spell
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.sweeps.statistics import holm, interval, is_tied, paired_difference

SAME = "≈"  # after a difference that the seeds cannot tell from none
BASELINE = "-"  # in place of the baseline's difference from itself
LATEX = {"±": r"$\pm$", SAME: r"$\approx$", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "|": r"$|$"}


def table_rows(study: StudyFolder, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each point without its seed, in the order of the study.

    A row has the values of the axes, the number of scored `seeds` and of all `cells`, the mean score with its 95 %
    interval, and the difference from the baseline, or from the best row if the study names none, with Holm's p value.
    """
    groups: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        groups[json.dumps(result.group)].append(result)
    rows = [_row(study, group) for group in groups.values()]
    scores = [_by_seed(group) for group in groups.values()]
    baseline = _baseline(study, list(groups.values()), rows)
    differences = [paired_difference(score, scores[baseline] if baseline is not None else {}) for score in scores]
    compared = [math.nan if i == baseline else found.p for i, found in enumerate(differences)]
    for i, (row, found, p) in enumerate(zip(rows, differences, holm(compared), strict=True)):
        row |= {"minus_baseline": found.mean, "minus_ci95": found.half, "p_holm": p, "is_baseline": i == baseline}
    return rows


def _row(study: StudyFolder, group: Sequence[Result]) -> dict[str, Any]:
    scores = list(_by_seed(group).values())
    states = collections.Counter(result.state for result in group if result.state != claims.DONE)
    done = [result.summary for result in group if result.summary]
    return {
        **{key: spell(value) for key, value in group[0].group.items()},
        "seeds": len(scores),
        "cells": len(group),
        "not_done": " ".join(f"{count} {state}" for state, count in states.items()),
        **mean_columns(study.metric, scores),
        "trained_params": done[0].get("trained_params", math.nan) if done else math.nan,
        "seconds": statistics.fmean(summary.get("seconds", math.nan) for summary in done) if done else math.nan,
        "code": " ".join(sorted({str(r.history.last.get("code")) for r in group if r.summary})),
    }


def _by_seed(group: Sequence[Result]) -> dict[int, float]:
    return {result.seed: result.score for result in group if not math.isnan(result.score)}


def _baseline(study: StudyFolder, groups: Sequence[Sequence[Result]], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of the row that others are compared with: the study's baseline, or the best; None without scores."""
    if study.baseline is not None:
        found = [i for i, group in enumerate(groups) if study.baseline.items() <= group[0].group.items()]
        return found[0] if found else None
    means = {
        i: row[f"{study.metric}_mean"] for i, row in enumerate(rows) if not math.isnan(row[f"{study.metric}_mean"])
    }
    choose = min if study.mode == "min" else max
    return choose(means, key=lambda i: means[i]) if means else None


def note(study: StudyFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    """The sentences under a table: what its figures are, and what was done to get them."""
    spread = "± is half of Student's 95 % interval of the mean over the seeds."
    chosen = "the best row, chosen by these same scores" if study.baseline is None else "the baseline"
    tie = f"Differences from {chosen} are taken seed by seed; {SAME} marks one that the seeds cannot tell from none"
    parts = [spread, f"{tie} (paired t test, corrected by Holm over the rows)."]
    if study.halving:
        h = study.halving
        rule = f"grace={h.grace} and reduction={h.reduction}"
        parts.append(f"Successive halving stopped poor cells early ({rule}): a stopped cell has no score.")
    versions = {version for row in rows for version in row["code"].split(" ") if version}
    if len(versions) > 1:
        parts.append(f"The cells are of {plural(len(versions), 'version')} of the code: {', '.join(sorted(versions))}.")
    return " ".join(parts)


def write_tables(study: StudyFolder, results: Sequence[Result], folder: AnyPath | None = None) -> list[AnyPath]:
    """Writes `table.csv`, `table.md` and `table.tex` in `folder`, by default the study's; returns their paths."""
    rows, folder = table_rows(study, results), folder or study.path
    title = f"**{study.name}**: {study.metric} ({'lower' if study.mode == 'min' else 'higher'} is better)"
    return [
        write_csv(folder / "table.csv", list(rows[0]), rows),
        write_text(folder / "table.md", f"{title}\n\n{markdown(study, rows)}\n\n{note(study, rows)}\n"),
        write_text(folder / "table.tex", latex(study, rows) + "\n"),
    ]


def markdown(study: StudyFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    head, body = table_cells(study, rows)
    return markdown_table(head, body, _num_axes(rows))


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Lines of cells in Markdown: the first `texts` columns are aligned to the left, the others to the right."""
    rule = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    rows = [[cell.replace("|", r"\|") for cell in line] for line in (head, rule, *lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def latex(study: StudyFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in LaTeX, for the package booktabs."""
    head, body = table_cells(study, rows)
    columns = "l" * _num_axes(rows) + "r" * (len(head) - _num_axes(rows))
    lines = [" & ".join(map(_in_latex, line)) + r" \\" for line in (head, *body)]
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])


def _in_latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text.replace("\\", r"\textbackslash{}"))


def _num_axes(rows: Sequence[Mapping[str, Any]]) -> int:
    return list(rows[0]).index("seeds")


def table_cells(study: StudyFolder, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """`(heading, lines)` of the table for people, as text."""
    axes = list(rows[0])[: _num_axes(rows)]
    than = "the best" if study.baseline is None else "the baseline"
    head = [*axes, "seeds", study.metric, f"minus {than}", "trained", "seconds"]
    return head, [[*(row[axis] for axis in axes), *_figures(study, row)] for row in rows]


def _figures(study: StudyFolder, row: Mapping[str, Any]) -> list[str]:
    seeds = f"{row['seeds']} ({row['not_done']})" if row["not_done"] else str(row["seeds"])
    mark = f" {SAME}" if is_tied(row["p_holm"]) else ""
    return [
        seeds,
        format_mean(row[f"{study.metric}_mean"], row[f"{study.metric}_ci95"]),
        BASELINE if row["is_baseline"] else format_mean(row["minus_baseline"], row["minus_ci95"], mark),
        "" if math.isnan(row["trained_params"]) else f"{row['trained_params']:,}",
        "" if math.isnan(row["seconds"]) else f"{row['seconds']:.1f}",
    ]


def format_mean(mean: float, spread: float, mark: str = "") -> str:
    """`0.927 ± 0.026`, without an interval if it is NaN, and nothing for no mean; from 10,000 on with three digits.

    An interval that three decimals would show as 0.000 has two digits of its own, as in `0.00410 ± 0.00025`.
    """
    if math.isnan(mean):
        return ""
    decimals = 1 - math.floor(math.log10(spread)) if 1e-9 < spread < 5e-4 else 3
    digits = f".{decimals}f" if abs(mean) < 1e4 else ".2e"
    return f"{mean:{digits}}" + ("" if math.isnan(spread) else f" ± {spread:{digits}}") + mark


def mean_columns(name: str, values: Sequence[float]) -> dict[str, float]:
    """`{NAME_mean, NAME_ci95}`: the mean and half of its 95 % interval, NaN where there are too few values."""
    return {f"{name}_mean": statistics.fmean(values) if values else math.nan, f"{name}_ci95": interval(values)}


def write_csv(path: AnyPath, columns: Sequence[str], table: Sequence[Mapping[str, Any]]) -> AnyPath:
    """Writes the table with these columns, and its fractions with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    return write_text(path, text.getvalue())
