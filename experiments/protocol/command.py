"""Runs a study of `experiments/`: `python -m experiments.NAME [--size=small] [--workers=1] [--folder=DIR] [...]`.

    --size=small     ci (two steps, to see that all works), small (real weights and text), or paper
    --workers=1      processes that run cells side by side on this machine; 0: write the tables of what is done
    --folder=DIR     the folder of the sweeps; by default runs/NAME/SIZE
    --results=DIR    where tables and plots go; by default experiments/NAME/results for `small`, else in runs/
    --config.a.b=c   changes the config of every run

It searches the learning rates, then runs the final phase, then writes the tables, the plot and, for the committed
results, the README's table. The same command continues a study that was stopped, and runs no cell twice. The exit code
is that of `launch.sweep`, and 1 if a row has too few scores for a table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import tables
from experiments.protocol.experiment import FINAL, PHASES, PLOT_FILE, RATES, Experiment
from experiments.protocol.measures import read_measured
from experiments.protocol.plot import plot_rows
from experiments.protocol.rates import write_rates
from experiments.protocol.table import conclusion, write_table
from launch import command, sweep
from lowrank.core.errors import UserError
from lowrank.core.files import write_bytes
from lowrank.core.paths import AnyPath, as_path, exists
from lowrank.sweeps.folder import RECORD, read_folder
from lowrank.sweeps.status import Status


def main(experiment: Experiment, argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        text = f"{experiment.question}\n\n{__doc__}"
        args, changes = parse(experiment.name, text, argv)
        results = as_path(args.results) if args.results else experiment.results(args.size)
        folder = as_path(args.folder or f"runs/{experiment.name}/{args.size}")
        if experiment.prepare and args.workers and args.size != "paper":
            experiment.prepare()
        for phase in PHASES:
            if code := _run_phase(experiment, args, changes, phase, folder / phase, results):
                return code
    except (OSError, UserError) as e:
        return command.print_error(e)
    return 0


def parse(name: str, text: str, argv: Sequence[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    """`(options, changes of the config)` of a study's command; `text` is its help, `flags` are further ones."""
    parser = command.Parser(f"python -m experiments.{name}", text)
    parser.add_argument("--size", default="small", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    for flag in ("--folder", "--results", *flags):
        parser.add_argument(flag, default="", help=argparse.SUPPRESS)
    return parser.parse_with_changes(argv)


def _run_phase(
    experiment: Experiment,
    args: argparse.Namespace,
    changes: Sequence[str],
    phase: str,
    folder: AnyPath,
    results: AnyPath,
) -> int:
    """Runs a phase to its end and writes its tables; returns the exit code, 0 if the next phase may start."""
    study = f"--study={experiment.file()}:{args.size},{phase},{results}"
    if args.workers:
        code = sweep.main([study, f"--folder={folder}", f"--workers={args.workers}", *changes])
        if code not in (0, 1):
            return code
    elif not exists(folder / RECORD):
        print(f"the phase {phase} has not started: there is no study in {folder}")
        return 1
    status = Status(read_folder(folder))
    if not status.finished:
        print(f"{status.headline()}: the same command continues")
        return 1
    {RATES: _finish_rates, FINAL: _finish}[phase](experiment, args.size, status, results)
    return 0


def _finish_rates(experiment: Experiment, size: str, status: Status, results: AnyPath) -> None:
    print("rates:", write_rates(experiment.size(size), status.study, status.results, results))


def _finish(experiment: Experiment, size: str, status: Status, results: AnyPath) -> None:
    """Writes the tables and plots of the final phase, and the README's table for the committed results."""
    write_table(experiment, experiment.size(size), status.study, status.results, results)
    if experiment.analyze:
        experiment.analyze(experiment, status.study, results)
    rows = read_measured(results)
    write_bytes(results / PLOT_FILE, (experiment.plot or plot_rows)(experiment, rows))
    if results == experiment.results("small"):
        tables.rewrite(Path(experiment.file().parent / "README.md"))
    print(conclusion(experiment, rows))
