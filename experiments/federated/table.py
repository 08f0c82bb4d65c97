"""The tables of the study: accuracy after the last round, and the gap of every round."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.federated.rounds import ROWS, Row
from experiments.protocol.experiment import PLOT_FILE, TABLE_FILE
from experiments.protocol.table import NOT_RUN, as_number, read_rows
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_bytes
from lowrank.sweeps.statistics import holm, is_tied, paired_difference
from lowrank.sweeps.tables import BASELINE as NO_DIFFERENCE
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv

BASELINE, ROUNDS_FILE = "FedIT", "rounds.csv"


def path(folder: Path, row: Row, seed: int) -> Path:
    """The file of a row's scores on a seed."""
    return folder / "scores" / f"{row.name.lower().replace(' ', '-')}-{seed}.json"


def write_tables(folder: Path, results: Path, seeds: int) -> None:
    """Writes `table.csv`, `rounds.csv` and the plot. Raises UserError for a row that has not run."""
    found: dict[str, dict[int, Any]] = {}
    for row in ROWS:
        for seed in range(seeds):
            if not (file := path(folder, row, seed)).exists():
                raise UserError(f"{file} is missing: run the study with --workers=1, which computes it")
            found.setdefault(row.name, {})[seed] = read_json(file)
    results.mkdir(parents=True, exist_ok=True)
    last = {name: {seed: of["accuracy"][-1] for seed, of in runs.items()} for name, runs in found.items()}
    differences = {name: paired_difference(of, last[BASELINE]) for name, of in last.items()}
    adjusted = holm([math.nan if name == BASELINE else of.p for name, of in differences.items()])
    lines = [
        {"row": name, "seeds": len(last[name]), **mean_columns("accuracy", list(last[name].values()))}
        | mean_columns("gap", [of["gap"][-1] for of in found[name].values()])
        | {"minus_fedit": differences[name].mean, "minus_ci95": differences[name].half, "p_holm": p}
        for name, p in zip(found, adjusted, strict=True)
    ]
    write_csv(results / TABLE_FILE, list(lines[0]), lines)
    rounds = [
        {"row": name, "round": i + 1, "seeds": len(runs)}
        | mean_columns("accuracy", [of["accuracy"][i] for of in runs.values()])
        | mean_columns("gap", [of["gap"][i] for of in runs.values()])
        for name, runs in found.items()
        for i in range(len(runs[0]["gap"]))
    ]
    write_csv(results / ROUNDS_FILE, list(rounds[0]), rounds)
    write_bytes(results / PLOT_FILE, _plot(results))


def _plot(results: Path) -> bytes:
    """Accuracy and gap over the rounds."""
    figure, panels = plotting.make_figure(columns=2)
    rows = read_rows(results / ROUNDS_FILE)
    for axes, key in zip(panels, ("accuracy", "gap"), strict=True):
        for i, of in enumerate(ROWS):
            own = [row for row in rows if row["row"] == of.name]
            means, halves = ([as_number(row[f"{key}_{part}"]) for row in own] for part in ("mean", "ci95"))
            look: dict[str, Any] = {"color": plotting.COLORS[i], "marker": plotting.MARKERS[i]}
            axes.errorbar([int(row["round"]) for row in own], means, yerr=halves, label=of.name, linewidth=1.2, **look)
        axes.set_xlabel("round")
        axes.set_xticks(sorted({int(row["round"]) for row in rows}))
        axes.set_ylabel({"accuracy": "accuracy", "gap": "gap, relative to the mean update"}[key])
    panels[0].legend()
    return plotting.to_png(figure)


def markdown(results: Path) -> str:
    """The table for the README, with the sentence that it supports."""
    if not (results / TABLE_FILE).exists():
        return NOT_RUN
    rows = read_rows(results / TABLE_FILE)
    head = ["row", "seeds", "accuracy", f"minus {BASELINE}", "gap of the last round"]
    return f"{markdown_table(head, map(_cells, rows))}\n\n**{conclusion(rows)}**"


def _cells(row: Mapping[str, str]) -> list[str]:
    mark = f" {SAME}" if is_tied(as_number(row["p_holm"])) else ""
    difference = format_mean(as_number(row["minus_fedit"]), as_number(row["minus_ci95"]), mark)
    accuracy, gap = (
        format_mean(as_number(row[f"{key}_mean"]), as_number(row[f"{key}_ci95"])) for key in ("accuracy", "gap")
    )
    compared = NO_DIFFERENCE if row["row"] == BASELINE else difference
    return [row["row"], row["seeds"], accuracy, compared, gap]


def conclusion(rows: list[dict[str, str]]) -> str:
    """How large FedIT's gap is, and which rows' accuracies differ from its own."""
    gap = next(float(row["gap_mean"]) for row in rows if row["row"] == BASELINE)
    told = [row for row in rows if row["row"] != BASELINE and not is_tied(as_number(row["p_holm"]))]
    parts = [f"{row['row']} by {float(row['minus_fedit']):+.3f}" for row in told]
    found = f"differ in accuracy: {', '.join(parts)}" if parts else "no row's accuracy is told from its own"
    return f"In its last round FedIT loses {gap:.1%} of the mean update; from FedIT, {found}."
