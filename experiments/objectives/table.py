"""The tables of the study, one CSV file and one plot for each part, and their Markdown for the README."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.objectives.part import Numbers, Part
from experiments.protocol.table import NOT_RUN, as_number, read_rows
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_bytes
from lowrank.sweeps.statistics import holm, is_tied, paired_difference
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv

START = "start"  # the row of the model that the runs of a part start from, which is measured once
NOTE = (
    "± is half of Student's 95 % interval of the mean over the seeds; {same} marks a number that the seeds cannot tell "
    "from {baseline}'s (paired t test, corrected by Holm over the rows)."
)


def path(folder: Path, part: Part, row: str, seed: int) -> Path:
    """The file of a row's numbers on a seed."""
    return folder / "numbers" / f"{part.name}-{row.lower().replace(' ', '-').replace('.', '_')}-{seed}.json"


def cells(part: Part, seeds: int) -> list[tuple[str, int]]:
    """`(row, seed)` of every model that is measured; the start has one."""
    return [(START, 0), *((row, seed) for row in part.rows for seed in range(seeds))]


def write_table(part: Part, seeds: int, folder: Path, results: Path) -> None:
    """Writes the part's CSV file and plot. Raises UserError for a row that has not run."""
    found: dict[str, dict[int, Numbers]] = {}
    for row, seed in cells(part, seeds):
        if not (file := path(folder, part, row, seed)).exists():
            raise UserError(f"{file} is missing: run the study with --workers=1, which computes it")
        found.setdefault(row, {})[seed] = read_json(file)
    lines: list[dict[str, Any]] = [{"row": row, "seeds": len(of)} for row, of in found.items()]
    for name in found[START][0]:
        by_row = {row: {seed: of[seed][name] for seed in of} for row, of in found.items()}
        differences = {row: paired_difference(of, by_row[part.baseline]) for row, of in by_row.items()}
        compared = [math.nan if row in (START, part.baseline) else differences[row].p for row in found]
        for line, of, difference, p in zip(lines, by_row.values(), differences.values(), holm(compared), strict=True):
            line |= mean_columns(name, list(of.values()))
            line |= {f"{name}_minus": difference.mean, f"{name}_minus_ci95": difference.half, f"{name}_p_holm": p}
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / f"{part.name}.csv", list(lines[0]), lines)
    write_bytes(results / f"{part.name}.png", _plot(part, read_rows(results / f"{part.name}.csv")))


def _plot(part: Part, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The first two numbers of the part, one point for each row."""
    figure, panels = plotting.make_figure(columns=2)
    for axes, name in zip(panels, list(part.headings)[:2], strict=True):
        means, halves = ([as_number(row[f"{name}_{end}"]) for row in rows] for end in ("mean", "ci95"))
        plotting.draw_forest(axes, [row["row"] for row in rows], means, halves)
        axes.set_xlabel(part.headings[name].text)
    return plotting.to_png(figure)


def markdown(parts: Mapping[str, Part], results: Path) -> str:
    """The tables of all parts."""
    return "\n\n".join(f"### {part.question}\n\n{_markdown(part, results)}" for part in parts.values())


def _markdown(part: Part, results: Path) -> str:
    if not (results / f"{part.name}.csv").exists():
        return NOT_RUN
    rows = read_rows(results / f"{part.name}.csv")
    head = ["row", "seeds", *(heading.text for heading in part.headings.values())]
    lines = [[row["row"], row["seeds"], *(_cell(part, row, name) for name in part.headings)] for row in rows]
    note = NOTE.format(same=SAME, baseline=part.baseline)
    return f"{markdown_table(head, lines)}\n\n{note}\n\n**{conclusion(part, rows)}**"


def _cell(part: Part, row: Mapping[str, str], name: str) -> str:
    mean, half = (as_number(row[f"{name}_{end}"]) for end in ("mean", "ci95"))
    compared = row["row"] not in (START, part.baseline)
    return format_mean(mean, half, f" {SAME}" if compared and is_tied(as_number(row[f"{name}_p_holm"])) else "")


def conclusion(part: Part, rows: Sequence[Mapping[str, str]]) -> str:
    """What the seeds tell from the baseline, number by number, of those of which one side is better."""
    sentences = []
    for name, heading in part.headings.items():
        if heading.better:
            told = [row for row in rows if row["row"] not in (START, part.baseline)]
            told = [row for row in told if not is_tied(as_number(row[f"{name}_p_holm"]))]
            good = [row["row"] for row in told if (as_number(row[f"{name}_minus"]) > 0) == (heading.better == "max")]
            bad = [row["row"] for row in told if row["row"] not in good]
            found = [f"{', '.join(names)} {word}" for names, word in ((good, "better"), (bad, "worse")) if names]
            sentences.append(f"{heading.text}: {' and '.join(found) or 'not decided'}")
    return f"Compared with {part.baseline}, by {'; by '.join(sentences)}."
