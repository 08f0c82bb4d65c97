"""The folder of a study: `study.json`, written once, from which any worker on any machine takes the cells.

    study.json           the cells with their configs, and the settings of the study
    limits.json          its limits, which may change from one start to the next
    events/              the claims and the results: one file for each event of a cell
    rungs/               the scores at each rung of successive halving
    runs/KEY/            the folder of a cell's run: checkpoints, log, report, adapter
    logs/KEY.0001.txt    what the run said under the first claim on it
    table.csv, .md, .tex the results, which an engine writes at its end, as a page too: report.html
    hparams/             the same for TensorBoard's tab HParams

It is a local folder or one in a bucket.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, plural
from lowrank.core.files import read_json, to_json, write_json
from lowrank.core.paths import AnyPath, exists
from lowrank.sweeps.axes import Point
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.claims import create
from lowrank.sweeps.study import Halving, Limits, Study

RECORD, LIMITS = "study.json", "limits.json"


@dataclasses.dataclass(frozen=True)
class StudyFolder:
    """A study as its folder records it."""

    path: AnyPath
    name: str
    cells: tuple[Cell, ...]
    metric: str
    mode: str
    baseline: Point | None
    halving: Halving | None
    limits: Limits

    def run_path(self, key: str) -> AnyPath:
        """The folder of a cell's run."""
        return self.path / "runs" / key

    def log_path(self, key: str, number: int) -> AnyPath:
        """The file of what a cell's run said under the claim of this number."""
        return self.path / "logs" / f"{key}.{number:04d}.txt"


def check_folder(study: Study, path: AnyPath) -> None:
    """Raises UserError if `path` is the folder of another study or of another version of it. Nothing is written."""
    if exists(path / RECORD):
        _check_same(read_json(path / RECORD), _record(study), path)


def open_study(study: Study, path: AnyPath) -> StudyFolder:
    """Makes `path` the folder of a study, or checks that it is one.

    Raises UserError as `check_folder` and `Study.cells` do.
    """
    record = _record(study)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    if not create(path / RECORD, text.encode()):
        _check_same(read_json(path / RECORD), record, path)
    write_json(path / LIMITS, dataclasses.asdict(study.limits))
    return read_folder(path)


def read_folder(path: AnyPath) -> StudyFolder:
    """The study in a folder. Raises UserError if there is none."""
    if not exists(path / RECORD):
        raise UserError(f"{path} is not the folder of a study: it has no {RECORD}")
    record, limits = read_json(path / RECORD), read_json(path / LIMITS)
    try:
        cells = tuple(Cell(cell["key"], cell["point"], cell["config"]) for cell in record["cells"])
        halving = record["halving"] and Halving(**record["halving"])
        facts = {key: record[key] for key in ("name", "metric", "mode", "baseline")}
        return StudyFolder(path, cells=cells, halving=halving, limits=Limits(**limits), **facts)
    except (KeyError, TypeError) as e:
        raise UserError(f"{path / RECORD} is of another version of lowrank: {e}; choose another folder") from None


def _record(study: Study) -> dict[str, Any]:
    cells = [dataclasses.asdict(cell) for cell in study.cells()]
    record = {
        "name": study.name,
        "metric": study.metric,
        "mode": study.better(),
        "baseline": study.baseline,
        "halving": study.halving and dataclasses.asdict(study.halving),
        "version": hashlib.sha256(json.dumps(sorted(cell["key"] for cell in cells)).encode()).hexdigest()[:12],
        "cells": cells,
    }
    return to_json(record, "study")


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: AnyPath) -> None:
    """Raises UserError if the folder's study has other cells or settings."""
    for key in ("name", "metric", "mode", "baseline", "halving"):
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{path} holds another version of the study: {key} is {theirs.get(key)!r} there and {ours[key]!r} "
                "here; choose another folder"
            )
    if theirs.get("version") != ours["version"]:
        raise UserError(
            f"{path} holds another version of the study: {theirs.get('version')} with "
            f"{plural(len(theirs.get('cells', ())), 'cell')} there, {ours['version']} with "
            f"{plural(len(ours['cells']), 'cell')} here, {_difference(theirs, ours)}; choose another folder"
        )


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first cell that one of the two lacks."""
    labels = [{cell["key"]: Cell(**cell).label for cell in record["cells"]} for record in (theirs, ours)]
    theirs_labels, ours_labels = labels
    for side, mine, other in (("there", theirs_labels, ours_labels), ("here", ours_labels, theirs_labels)):
        for key, label in mine.items():
            if key not in other:
                return f"{label} only {side}"
    return "in another order"
