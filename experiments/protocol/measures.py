"""Further numbers of the trained models: `measures.csv`, with its statistics, and a table for the README.

Each model of the final phase is loaded from its adapter, and the numbers are kept beside it in `measures.json`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.protocol.experiment import TABLE_FILE, Experiment
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, compare, conclusion, is_baseline, read_rows
from lowrank import methods, pretrained
from lowrank.adapters import load
from lowrank.core.files import read_json, write_json
from lowrank.core.paths import AnyPath, exists
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.statistics import is_tied
from lowrank.sweeps.study import SEEDS
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv
from lowrank.training.config import with_precision
from lowrank.training.loop import ADAPTER

MEASURES_FILE, CELL_FILE = "measures.csv", "measures.json"
UNTRAINED = "untrained"
OF_BASE = ("param_dtype", "quantize", "upcycle", "precision")  # keys of the model group that an adapter records

Measure = Callable[[Model], Mapping[str, Any]]


class Heading(NamedTuple):
    """A number's heading in the README, and whether the best is the `min` or the `max`; "": neither is."""

    text: str
    better: str = ""


def load_model(config: Mapping[str, Any], adapter: AnyPath | None = None) -> Model:
    """The model of a cell's config with the adapter in a folder attached, or the untrained model."""
    group = dict(with_precision(config["model"]))
    options = {key: value for key, value in group.items() if key not in ("name", *OF_BASE)}
    how = {"model": options, "param_dtype": group.get("param_dtype", "float32")}
    bind = methods.build_method(config["method"]).bind if adapter else None
    base = load.load_adapted(adapter, group["name"], **how) if adapter else pretrained.load(group["name"], **how)
    return Model(ConfigDict(config), base, bind)


def write(
    experiment: Experiment, study: StudyFolder, results: AnyPath, measure: Measure, untrained: bool = True
) -> list[dict[str, Any]]:
    """Measures every trained model of the final phase, and the untrained one; writes `measures.csv`, returns its rows.

    A row has its labels and, for each number, its mean with the 95 % interval over the seeds, and its difference from
    the baseline with Holm's p value. The row of the untrained model has means alone.
    """
    rows = read_rows(results / TABLE_FILE)
    labels = [{label: row[label] for label in experiment.labels} for row in rows]
    by_row = itertools.groupby(study.cells, lambda cell: {k: v for k, v in cell.point.items() if k not in SEEDS})
    blocks = [[measured(study, cell, measure) for cell in cells] for _, cells in by_row]
    names = list(next(found for block in blocks for found in block if found))
    lines: list[dict[str, Any]] = [
        {**label, "seeds": sum(map(bool, block))} for label, block in zip(labels, blocks, strict=True)
    ]
    for name in names:
        _add_statistics(experiment, lines, name, [_by_seed(block, name) for block in blocks])
    if untrained:
        label = {**dict.fromkeys(experiment.labels, ""), experiment.labels[0]: UNTRAINED}
        found = measure(load_model(study.cells[0].config))
        lines.append({**label, "seeds": "", **{f"{name}_mean": found[name] for name in names}})
    write_csv(results / MEASURES_FILE, list(lines[0]), lines)
    return lines


def measured(study: StudyFolder, cell: Cell, measure: Measure) -> Mapping[str, Any]:
    """The numbers of a cell; empty if it has no adapter."""
    folder = study.run_path(cell.key)
    if exists(folder / CELL_FILE):
        return read_json(folder / CELL_FILE)
    if not exists(folder / ADAPTER):
        return {}
    found = dict(measure(load_model(cell.config, folder / ADAPTER)))
    write_json(folder / CELL_FILE, found)
    return found


def _by_seed(block: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    return {seed: numbers[name] for seed, numbers in enumerate(block) if numbers}


def _add_statistics(
    experiment: Experiment, lines: Sequence[dict[str, Any]], name: str, by_row: Sequence[Mapping[int, float]]
) -> None:
    for line, values, difference in zip(lines, by_row, compare(experiment, lines, by_row), strict=True):
        line |= mean_columns(name, list(values.values()))
        line |= {f"{name}_{key}": value for key, value in difference.items()}


def read_measured(folder: AnyPath) -> list[dict[str, str]]:
    """The rows of `table.csv`, each with the numbers of `measures.csv` too, if there are some."""
    rows = read_rows(folder / TABLE_FILE)
    numbers = read_rows(folder / MEASURES_FILE) if exists(folder / MEASURES_FILE) else [{} for _ in rows]
    return [{**found, **row} for row, found in zip(rows, numbers, strict=False)]


def markdown(experiment: Experiment, folder: Path, headings: Mapping[str, Heading]) -> str:
    """The table of `measures.csv`, and a sentence for each number of which one side is better."""
    if not (folder / MEASURES_FILE).exists():
        return ""
    rows, labels = read_rows(folder / MEASURES_FILE), list(experiment.labels)
    head = [*labels, *(heading.text for heading in headings.values())]
    lines = [[*(row[label] for label in labels), *(_cell(experiment, row, name) for name in headings)] for row in rows]
    table = markdown_table(head, lines, len(labels))
    sentences = [_conclusion(experiment, rows, name, heading) for name, heading in headings.items() if heading.better]
    return "\n\n".join([table, *(f"**{sentence}**" for sentence in sentences)])


def _cell(experiment: Experiment, row: Mapping[str, str], name: str) -> str:
    if not row["seeds"]:
        return format_mean(as_number(row[f"{name}_mean"]), math.nan)
    tied = not is_baseline(experiment, row) and is_tied(as_number(row[f"{name}_p_holm"]))
    return format_mean(as_number(row[f"{name}_mean"]), as_number(row[f"{name}_ci95"]), f" {SAME}" * tied)


def _conclusion(experiment: Experiment, rows: Sequence[Mapping[str, str]], name: str, heading: Heading) -> str:
    compared = [
        {**row, "p_holm": row[f"{name}_p_holm"], "minus_baseline": row[f"{name}_minus_baseline"]}
        for row in rows
        if row["seeds"]
    ]
    return conclusion(dataclasses.replace(experiment, metric=heading.text, mode=heading.better), compared)
