"""The tables of the study, each a CSV file in `results/` with its seeds, and their Markdown for the README."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.merging import tasks
from experiments.merging.sizes import BASELINE, Size
from experiments.protocol.experiment import PLOT_FILE, TABLE_FILE
from experiments.protocol.table import NOT_RUN, as_number, read_rows
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_bytes
from lowrank.sweeps.statistics import Difference, holm, is_tied, paired_difference
from lowrank.sweeps.tables import BASELINE as NO_DIFFERENCE
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv

SOUPS_FILE, NEGATION_FILE = "soups.csv", "negation.csv"
EXPERTS, OTHERS = "own expert", ("joint", "ensemble")
Scores = Mapping[int, Mapping[str, float]]  # seed -> nats per token of every text


def write_tables(size: Size, folder: Path, results: Path) -> None:
    """Writes all tables and the plot. Raises UserError for a cell that has not run."""
    results.mkdir(parents=True, exist_ok=True)
    base = read(folder, "base-0")
    experts = {seed: {task: read(folder, f"{task}-{seed}") for task in tasks.TASKS} for seed in range(size.seeds)}
    own = {
        seed: {t: of[t][t] for t in tasks.TASKS}
        | {tasks.ELSEWHERE: statistics.fmean(one[tasks.ELSEWHERE] for one in of.values())}
        for seed, of in experts.items()
    }
    names = [*OTHERS, *(how.name for how in size.merges)]
    models: dict[str, Scores] = {"base": dict.fromkeys(range(size.seeds), base), EXPERTS: own}
    models |= {n: {seed: read(folder, f"{n}-{seed}") for seed in range(size.seeds)} for n in names}
    lines = [_line(name, of, base, own) for name, of in models.items()]
    _add_differences(lines, {name: _shares(of, base, own) for name, of in models.items()})
    write_csv(results / TABLE_FILE, list(lines[0]), lines)
    _write_negation(size, folder, results, models["joint"], base)
    _write_soups(size, folder, results)
    write_bytes(results / PLOT_FILE, _plot(read_rows(results / TABLE_FILE)))


def read(folder: Path, name: str) -> Any:
    """The numbers of a cell. Raises UserError where it has not run."""
    if not (path := folder / f"{name}.json").exists():
        raise UserError(f"{path} is missing: run the study with --workers=1, which computes it")
    return read_json(path)


def _shares(of: Scores, base: Mapping[str, float], own: Scores) -> dict[int, float]:
    """By seed, the share of the experts' gains over the base that a model has, as the mean over the tasks."""
    return {
        seed: statistics.fmean((base[t] - nll[t]) / (base[t] - own[seed][t]) for t in tasks.TASKS)
        for seed, nll in of.items()
    }


def _line(name: str, of: Scores, base: Mapping[str, float], own: Scores) -> dict[str, Any]:
    rule, _, density = name.rpartition("-")
    label = {"model": rule, "density": density} if density.startswith("0.") else {"model": name, "density": ""}
    rise = [math.exp(nll[tasks.ELSEWHERE]) - math.exp(base[tasks.ELSEWHERE]) for nll in of.values()]
    numbers = {task: [nll[task] for nll in of.values()] for task in tasks.TASKS}
    numbers |= {"share": list(_shares(of, base, own).values()), "rise": rise}
    line: dict[str, Any] = {**label, "seeds": len(of)}
    for key, values in numbers.items():
        line |= mean_columns(key, values)
    return line


def _add_differences(lines: Sequence[dict[str, Any]], shares: Mapping[str, Mapping[int, float]]) -> None:
    """Each row's share minus that of the plain mean, seed by seed, with Holm's p value over the merges."""
    found = [paired_difference(of, shares[BASELINE]) for of in shares.values()]
    compared = [d.p if name not in ("base", BASELINE) else math.nan for name, d in zip(shares, found, strict=True)]
    for line, of, p in zip(lines, found, holm(compared), strict=True):
        line |= {"minus_linear": of.mean, "minus_ci95": of.half, "p_holm": p}


def _write_negation(size: Size, folder: Path, results: Path, joint: Scores, base: Mapping[str, float]) -> None:
    models = {0.0: joint} | {
        c: {s: read(folder, f"joint-minus-{c:g}-{s}") for s in range(size.seeds)} for c in size.shares
    }
    kept = [task for task in tasks.TASKS if task != size.negated]
    lines = [_negation_line("base", size.negated, kept, dict.fromkeys(range(size.seeds), base))]
    lines += [
        _negation_line(f"joint - {c:g} {size.negated}" if c else "joint", size.negated, kept, of)
        for c, of in models.items()
    ]
    write_csv(results / NEGATION_FILE, list(lines[0]), lines)


def _negation_line(name: str, removed: str, kept: Sequence[str], of: Scores) -> dict[str, Any]:
    numbers = {
        "removed": [nll[removed] for nll in of.values()],
        "kept": [statistics.fmean(nll[task] for task in kept) for nll in of.values()],
        "elsewhere": [math.exp(nll[tasks.ELSEWHERE]) for nll in of.values()],
    }
    line: dict[str, Any] = {"model": name, "seeds": len(of)}
    for key, values in numbers.items():
        line |= mean_columns(key, values)
    return line


def _write_soups(size: Size, folder: Path, results: Path) -> None:
    lines = []
    for task in tasks.TASKS:
        found = read(folder, f"soup-{task}")
        taken = {"members": " ".join(map(str, found["members"])), "seeds": size.seeds}
        mean = statistics.fmean(found["runs"])
        lines.append({"task": task, "mean_run": mean} | {k: found[k] for k in ("best", "uniform", "greedy")} | taken)
    write_csv(results / SOUPS_FILE, list(lines[0]), lines)


def _plot(rows: Sequence[Mapping[str, str]]) -> bytes:
    """The share of the experts' gains and the rise of perplexity elsewhere, one line for each row."""
    names = [" ".join(filter(None, (row["model"], row["density"]))) for row in rows]
    figure, panels = plotting.make_figure(columns=2, height=0.8 + 0.2 * len(rows))
    labels = ("share of the experts' gains", "rise of perplexity elsewhere")
    for axes, key, label in zip(panels, ("share", "rise"), labels, strict=True):
        means, halves = ([as_number(row[f"{key}_{part}"]) for row in rows] for part in ("mean", "ci95"))
        plotting.draw_forest(axes, names if axes is panels[0] else [""] * len(names), means, halves)
        axes.set_xlabel(label)
    panels[1].set_xscale("symlog", linthresh=10)  # a rule that rescales what it keeps may ruin the model
    return plotting.to_png(figure)


def markdown(results: Path) -> str:
    """The tables for the README, with what they show."""
    if not (results / TABLE_FILE).exists():
        return NOT_RUN
    rows, soups, negation = (read_rows(results / file) for file in (TABLE_FILE, SOUPS_FILE, NEGATION_FILE))
    head = ["model", "density", "seeds", *tasks.TASKS, "share of the gains", "minus the mean", "rise elsewhere"]
    merged = markdown_table(head, [_cells(row) for row in rows])
    numbers = ("removed", "kept", "elsewhere")
    columns = ["model", "seeds", "removed task", "other tasks", "perplexity elsewhere"]
    removed = markdown_table(columns, [[r["model"], r["seeds"], *(_mean(r, key) for key in numbers)] for r in negation])
    parts = ("mean_run", "best", "uniform", "greedy")
    columns = ["task", "seeds", "mean run", "best run by validation", "uniform soup", "greedy soup", "its members"]
    found = [[r["task"], r["seeds"], *(f"{float(r[part]):.3f}" for part in parts), r["members"]] for r in soups]
    return "\n\n".join(
        [merged, f"**{conclusion(rows)}**", removed, markdown_table(columns, found), soup_conclusion(soups)]
    )


def _mean(row: Mapping[str, str], key: str) -> str:
    return format_mean(as_number(row[f"{key}_mean"]), as_number(row[f"{key}_ci95"]))


def _cells(row: Mapping[str, str]) -> list[str]:
    tied = f" {SAME}" if row["p_holm"] and is_tied(as_number(row["p_holm"])) else ""
    difference = format_mean(as_number(row["minus_linear"]), as_number(row["minus_ci95"]), tied)
    compared = NO_DIFFERENCE if row["model"] in ("base", BASELINE) else difference
    figures = [_mean(row, key) for key in (*tasks.TASKS, "share")]
    return [row["model"], row["density"], row["seeds"], *figures, compared, _mean(row, "rise")]


def conclusion(rows: Sequence[Mapping[str, str]]) -> str:
    """Which merges differ from the plain mean of the experts, and which has the largest share."""
    merges = [row for row in rows if row["model"] not in ("base", EXPERTS, *OTHERS)]
    name = lambda row: " ".join(filter(None, (row["model"], row["density"])))  # noqa: E731
    best = max(merges, key=lambda row: float(row["share_mean"]))
    told = [row for row in merges if not is_tied(as_number(row["p_holm"])) and row["model"] != BASELINE]
    better = [name(row) for row in told if float(row["minus_linear"]) > 0]
    worse = [name(row) for row in told if float(row["minus_linear"]) < 0]
    found = [f"{', '.join(of)} {word}" for of, word in ((better, "keep more"), (worse, "keep less")) if of]
    largest = f"The largest share, {float(best['share_mean']):.2f}, is that of {name(best)}"
    return f"{largest}. Than the mean of the experts, {' and '.join(found) or 'no merge is told apart'}."


def soup_conclusion(soups: Sequence[Mapping[str, str]]) -> str:
    """The difference of the uniform soup from the best run, task by task."""
    uniform, best = ({row["task"]: float(row[key]) for row in soups} for key in ("uniform", "best"))
    found: Difference = paired_difference(uniform, best)
    tied = " (not told from none)" if is_tied(found.p) else ""
    return f"Over the tasks, the uniform soup minus the best run is {format_mean(found.mean, found.half)} nats{tied}."
