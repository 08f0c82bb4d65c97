"""Runs a study: `python -m launch.sweep --study=FILE.py[:ARG] --folder=DIR [--config.a.b=c ...] [options]`.

    --engine=local       who starts the workers; its own options are below
    --dry_run            list the cells, what each computes and whether it fits, and start nothing
    --device=h100[:8]    the device of each run, and the number of devices; by default, this machine's
    --topology=v5e:4x4   the TPU slice of each run, or v5e:4x4,slices=2 for several

The study file has a function `get_study`; `--config.a.b=c` changes its base config. All cells are checked before the
first starts. The same command continues a study that was stopped, and runs no cell twice. The exit code is 0 when every
cell is done, 1 when some have failed, 42 when the study was stopped, and 2 for bad input, with one line on stderr.
With --dry_run it is 1 if a cell does not fit. The engines of a cluster hand the workers over, and end with 0 when it
has taken them; `launch.status` shows the study.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from launch import command, engines, preflight, sweep_plan
from launch.engines import ENGINES
from lowrank.core import config_file
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import as_path
from lowrank.memory import devices
from lowrank.sweeps.folder import check_folder, open_study
from lowrank.sweeps.study import Study, load_study

PLANNER = "--planner"  # marks the process that checks the cells, which alone takes the devices


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`(options, [--config.a.b=c, ...])`. Raises UserError for an unknown flag."""
    parser = command.Parser("python -m launch.sweep", f"{__doc__}\n{engines.HELP}")
    for flag in ("--study", "--folder", "--device", "--topology"):
        parser.add_argument(flag, default="", help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="local", help=argparse.SUPPRESS)
    for flag in ("--dry_run", PLANNER):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for add_flags in dict.fromkeys(engine.add_flags for engine in ENGINES.values()):  # which engines may share
        add_flags(parser)
    args, changes = parser.parse_with_changes(argv)
    if args.engine not in ENGINES:
        raise unknown("engine", args.engine, ENGINES)
    return args, changes


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        args, changes = parse(argv)
        study, target = read_study(args.study, changes), _target(args)
        if args.planner:
            return sweep_plan.show(study, target) if args.dry_run else sweep_plan.check(study)
        if not args.dry_run and not args.folder:
            raise UserError("--folder=DIR is required: the study's claims, runs and results go there")
        study.cells()
        if args.folder:
            check_folder(study, as_path(args.folder))
        ENGINES[args.engine].check(args)
        code = _run_planner(argv, target if args.dry_run or not target else target._replace(topology=""))
        if args.dry_run:
            print(ENGINES[args.engine].describe(args), end="")
        if args.dry_run or code:
            return code
        return ENGINES[args.engine].run(open_study(study, as_path(args.folder)), args)
    except (OSError, UserError) as e:
        return command.print_error(e)


def read_study(spec: str, changes: Sequence[str]) -> Study:
    """The study of a file with changes of its base config, `--config.a.b=c`."""
    if not spec:
        raise UserError("--study=FILE.py is required")
    return with_words(load_study(spec), changes)


def with_words(study: Study, changes: Sequence[str]) -> Study:
    """The study with changes of its base config, `--config.a.b=c`."""
    base = study.base if isinstance(study.base, ConfigDict) else ConfigDict(study.base)
    for word in changes:
        config_file.override_word(base, word)
    return dataclasses.replace(study, base=base)


def _target(args: argparse.Namespace) -> devices.Target | None:
    if args.topology and args.device:
        raise UserError("--topology and --device both name the devices: give one of them")
    if not (args.topology or args.device):
        return None
    return devices.parse_topology(args.topology) if args.topology else devices.parse_device(args.device)


def _run_planner(argv: Sequence[str], target: devices.Target | None) -> int:
    """Checks the cells in a process of its own, so that this one leaves the machine's devices to the workers."""
    words = [sys.executable, "-m", "launch.sweep", PLANNER, *argv]
    environment = preflight.environment(target) if target else None
    return subprocess.run(words, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
