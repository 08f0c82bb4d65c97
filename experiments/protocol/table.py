"""The table of a study: rows of the final phase beside a paper's figures, and the sentence that they support."""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.protocol.experiment import RATES_FILE, TABLE_FILE, Experiment, Size
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath
from lowrank.sweeps import tables
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.sweeps.statistics import holm, is_tied, paired_difference
from lowrank.sweeps.tables import BASELINE, SAME, format_mean, markdown_table, write_csv

FEWEST_SEEDS = 3
EDGE = "*"  # after a learning rate at an edge of those that were tried
NOT_RUN = "Not run yet."


def write_table(
    experiment: Experiment, size: Size, study: StudyFolder, results: Sequence[Result], folder: AnyPath
) -> list[dict[str, Any]]:
    """Writes `table.csv` beside `rates.csv`; returns its rows. Raises UserError for a row with too few scores."""
    edges = [line["edge"] for line in read_rows(folder / RATES_FILE)]
    printed = dict.fromkeys(key for row in size.rows for key in row.printed)
    lines, found_rows = [], tables.table_rows(study, results)
    compared = differences(experiment, size, results)
    for row, found, edge, difference in zip(size.rows, found_rows, edges, compared, strict=True):
        if found["seeds"] < FEWEST_SEEDS:
            raise UserError(
                f"{' '.join(row.labels.values())} has {found['seeds']} scores of {found['cells']} runs "
                f"({found['not_done']}): a row needs {FEWEST_SEEDS}; the same command continues"
            )
        mean, half = (found[f"{study.metric}_{part}"] for part in ("mean", "ci95"))
        numbers = ("trained_params", "seconds", "code")
        line = {**row.labels, "lr": found["optim.lr"], "lr_at_edge": edge, "seeds": found["seeds"]}
        line |= {"score_mean": mean, "score_ci95": half, **difference, **{name: found[name] for name in numbers}}
        lines.append(line | {f"printed_{key}": row.printed.get(key, "") for key in printed})
    write_csv(folder / TABLE_FILE, list(lines[0]), lines)
    return lines


def differences(experiment: Experiment, size: Size, results: Sequence[Result]) -> list[dict[str, float]]:
    """Each row's difference from its baseline, seed by seed, with its interval and Holm's p value over all rows."""
    scores, waiting = list[dict[int, float]](), iter(results)
    for row in size.rows:
        block = itertools.islice(waiting, size.seeds_of(row))
        scores.append({result.seed: result.score for result in block if not math.isnan(result.score)})
    return compare(experiment, [row.labels for row in size.rows], scores)


def compare(
    experiment: Experiment, labels: Sequence[Mapping[str, str]], scores: Sequence[Mapping[int, float]]
) -> list[dict[str, float]]:
    """The differences of rows with these labels and `{seed: score}` from their baselines, as in `differences`."""
    found = []
    for i, (row, own) in enumerate(zip(labels, scores, strict=True)):
        wanted = {**experiment.baseline, **{label: row[label] for label in experiment.within}}
        baseline = next(j for j, other in enumerate(labels) if wanted.items() <= other.items())
        of = paired_difference(own, scores[baseline])
        found.append(of if baseline != i else of._replace(p=math.nan))
    adjusted = holm([each.p for each in found])
    return [
        {"minus_baseline": each.mean, "minus_ci95": each.half, "p_holm": p}
        for each, p in zip(found, adjusted, strict=True)
    ]


def read_rows(path: AnyPath) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))


def markdown(experiment: Experiment, folder: Path) -> str:
    """The table for a README with the conclusion under it, from `table.csv` in `folder`."""
    if not (folder / TABLE_FILE).exists():
        return NOT_RUN
    rows = read_rows(folder / TABLE_FILE)
    labels = list(experiment.labels)
    printed = [key for key in rows[0] if key.startswith("printed_")]
    head = [*labels, "lr", "seeds", experiment.metric, f"minus {baseline_name(experiment)}", "parameters"]
    head += [f"{experiment.source}: {key.removeprefix('printed_')}" for key in printed]
    text = markdown_table(head, [_cells(experiment, row, printed) for row in rows], len(labels))
    more = "\n\n" + experiment.more(experiment, folder) if experiment.more else ""
    return f"{text}\n\n{note(rows)}\n\n**{conclusion(experiment, rows)}**{more}"


def _cells(experiment: Experiment, row: Mapping[str, str], printed: list[str]) -> list[str]:
    mark = f" {SAME}" if is_tied(float(row["p_holm"])) else ""
    difference = format_mean(float(row["minus_baseline"]), float(row["minus_ci95"]), mark)
    return [
        *(row[label] for label in experiment.labels),
        f"{float(row['lr']):g}" + EDGE * (row["lr_at_edge"] == "True"),
        row["seeds"],
        format_mean(float(row["score_mean"]), float(row["score_ci95"])),
        BASELINE if is_baseline(experiment, row) else difference,
        f"{int(row['trained_params']):,}",
        *(row[key] for key in printed),
    ]


def is_baseline(experiment: Experiment, row: Mapping[str, str]) -> bool:
    """Whether a row of `table.csv` is the one that all others are compared with."""
    return experiment.baseline.items() <= row.items()


def row_name(experiment: Experiment, row: Mapping[str, str]) -> str:
    """The labels of a row of `table.csv` as one name."""
    return _name({label: row[label] for label in experiment.labels})


def baseline_name(experiment: Experiment) -> str:
    """The labels that name the baseline, and those that it shares with a row."""
    shared = f" of the same {' and '.join(experiment.within)}" if experiment.within else ""
    return _name(experiment.baseline) + shared


def _name(labels: Mapping[str, str]) -> str:
    """Labels as one name, with the name of the column before a number."""
    words = (f"{label} {value}" if value[0].isdigit() else value for label, value in labels.items())
    return " · ".join(words)


def note(rows: Sequence[Mapping[str, str]]) -> str:
    """The sentences under a table."""
    parts = [
        "± is half of Student's 95 % interval of the mean over the seeds, which draw the new leaves and the order of "
        f"the data. Differences are taken seed by seed; {SAME} marks one that the seeds cannot tell from none (paired "
        "t test, corrected by Holm over the rows). The intervals do not cover the choice of the test examples or of "
        "the rate."
    ]
    if any(row["lr_at_edge"] == "True" for row in rows):
        parts.append(f"{EDGE} marks a rate at an edge of those that were tried: a better one may lie beyond it.")
    return " ".join(parts)


def conclusion(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> str:
    """One sentence that the table supports, or that nothing is decided."""
    better, worse, tied = [], [], []
    for row in (row for row in rows if not is_baseline(experiment, row)):
        name = row_name(experiment, row)
        p, difference = float(row["p_holm"]), float(row["minus_baseline"])
        kind = tied if is_tied(p) else better if (difference > 0) == is_higher_better(experiment) else worse
        kind.append(name)
    baseline = baseline_name(experiment)
    if not better and not worse:
        return f"Not decided: these seeds tell no row from {baseline} by {experiment.metric}."
    found = [f"{_listed(names)} {word}" for names, word in ((better, "better"), (worse, "worse")) if names]
    rest = f"; not decided: {_listed(tied)}" if tied else ""
    return f"By {experiment.metric}, compared with {baseline}: {' and '.join(found)}{rest}."


def is_higher_better(experiment: Experiment) -> bool:
    """Whether a higher score is better."""
    return experiment.get_study("small,rates").better() == "max"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def as_number(text: str) -> float:
    """The number in a cell of a CSV file, NaN for an empty one."""
    return float(text) if text else math.nan
