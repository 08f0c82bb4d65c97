"""Reports whether a run fits: `python -m launch.preflight --config=FILE.py[:ARG] [--config.a.b=c ...] [options]`.

    --device=h100[:8]    the device of the run, and the number of devices; by default, the devices of this machine
                         (to compile for a GPU that this machine lacks: pip install 'jax[cuda12-local]')
    --topology=v5e:4x4   compile for a TPU slice, on a machine without TPUs (needs the extra `tpu`), or for several
                         slices, v5e:4x4,slices=2 with --config.mesh.num_slices=2
    --formula            compile nothing: the memory by formula alone, in seconds
    --search             with --topology, the microbatches, rematerialization and mesh of the least time that fit
    --json               print the report as JSON

    python -m launch.preflight --table               the literature's figures beside ours
    python -m launch.preflight formats [VALUE ...]   the value of a number in each number format

The weights are not read: a folder with a `config.json` is enough. The exit code is 1 for a run that does not
fit. Bad input is one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from experiments.plan import literature, number_formats
from launch import command
from lowrank.core import config_file
from lowrank.core.errors import UserError
from lowrank.memory import advice, compiled, devices, flops, formulas, gpus, report, roofline, search, tpus, traffic
from lowrank.memory.shapes import StepInputs, step_inputs
from lowrank.training import build
from lowrank.training.run import Run

FINALISTS = 3  # of a search, which are compiled until one fits
WORKER = "--worker"  # marks the process that compiles for a slice or for several devices


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`(options, [--config.a.b=c, ...])`. Raises UserError for an unknown flag."""
    parser = command.Parser("python -m launch.preflight", __doc__)
    for flag in ("--config", "--topology", "--device"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--json", "--table", "--formula", "--search", WORKER):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_with_changes(argv)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        args, changes = parse(argv)
        if args.words:
            print(_formats(args))
        elif args.table:
            print(_printed(args, literature.rows(), literature.text))
        else:
            return _preflight(args, changes, argv)
    except UserError as e:
        return command.print_error(e)
    return 0


def _formats(args: argparse.Namespace) -> str:
    if args.words[0] != "formats":
        raise UserError(f"{args.words[0]!r} is not a command: give `formats`, --config=FILE.py or --table")
    return _printed(args, number_formats.rows(args.words[1:]), number_formats.text)


def _printed(args: argparse.Namespace, rows: Any, text: Any) -> str:
    return json.dumps(rows, indent=2) if args.json else text(rows)


def _preflight(args: argparse.Namespace, changes: Sequence[str], argv: Sequence[str]) -> int:
    if not args.config:
        raise UserError("--config=FILE.py is required (or --table, or formats)")
    if args.topology and args.device:
        raise UserError("--topology and --device both name the devices: give one of them")
    target = None
    if args.topology or args.device:
        target = devices.parse_topology(args.topology) if args.topology else devices.parse_device(args.device)
    if target and not args.worker and (target.topology or target.num_devices > 1):
        return _run_worker(target, argv)
    if args.search:
        return _search(load_config(args.config, changes), target, args)
    result = with_advice(make_report(load_config(args.config, changes), target, compiles=not args.formula))
    print(json.dumps(report.to_json(result), indent=2) if args.json else report.to_text(result))
    return 0 if result.fits else 1


def _search(config: Any, target: devices.Target | None, args: argparse.Namespace) -> int:
    """Prints the settings that fit the target; returns 1 if none does."""
    target = search.check_target(target)
    found = search.candidates(config, target, jax.devices())
    for i, candidate in enumerate(() if args.formula else found[:FINALISTS]):
        print(f"compiling {i + 1} of at most {FINALISTS}: {candidate.flags}", file=sys.stderr, flush=True)
        varied = config_file.with_changes(config, candidate.changes)
        found[i] = dataclasses.replace(candidate, compiled=make_report(varied, target).needed)
        if search.chosen(found, target):
            break
    print(json.dumps(search.to_json(found, target), indent=2) if args.json else search.to_text(found, target))
    return 0 if search.chosen(found, target) else 1


def load_config(spec: str, changes: Sequence[str]) -> Any:
    """The config of a file with its changes, `--config.a.b=c`. Raises UserError for a change that it does not have."""
    config = config_file.load_config(spec)
    for word in changes:
        config_file.override_word(config, word)
    return config


def _run_worker(target: devices.Target, argv: Sequence[str]) -> int:
    """Runs the command in a process that has the target's devices."""
    words = [sys.executable, "-m", "launch.preflight", WORKER, *argv]
    return subprocess.run(words, env=environment(target), check=False).returncode


def environment(target: devices.Target) -> dict[str, str]:
    """The environment of a process whose jax has the slice or devices, which it reads when it starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={target.num_devices}"
    settings = tpus.environment(target.topology) if target.topology else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if target.topology and not importlib.util.find_spec("libtpu"):
        raise UserError("--topology compiles with libtpu, which is not installed: pip install 'lowrank[tpu]'")
    return {**os.environ, **settings}


def make_report(config: Any, target: devices.Target | None, compiles: bool = True) -> report.Report:
    """The report of a config's run for the target, or for this machine. Where it `compiles` nothing, it is by formula.

    A process that compiles for a topology needs the environment of `tpus.environment`.
    """
    abstract_devices = compile_only_devices(target) if target else None
    run = build.build_run(config, abstract_devices, planned=True)
    native = target is None or bool(abstract_devices) or _is_local(target)
    target = target or devices.local_target(list(run.mesh.devices.flat))
    inputs = step_inputs(run)
    by_formula, operations = formulas.estimate_memory(run, inputs), flops.step_flops(run, inputs)
    by_compiler = _compile_programs(run, inputs, target) if compiles else None
    moved = by_compiler.step.moved if by_compiler and native else traffic.moved_bytes(run, inputs)
    bound = roofline.bound(target, run, operations, by_formula, moved)
    return report.Report(run, target, by_formula, by_compiler, native, [], operations, bound)


def with_advice(r: report.Report) -> report.Report:
    """The report with advice, if the run does not fit."""
    if r.fits:
        return r
    room = r.target.memory * min(1.0, r.formula.peak / r.needed)  # in the formula's bytes, which may be too few
    return dataclasses.replace(r, advice=advice.advise(r.run, int(room)))


def _compile_programs(run: Run, inputs: StepInputs, target: devices.Target) -> compiled.Compiled:
    try:
        return compiled.compile_programs(run, inputs)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"the run does not compile for {target.name}: {str(e).splitlines()[0]}") from e


def compile_only_devices(target: devices.Target) -> list[Any] | None:
    """The target's devices to compile for; None if they are in this machine, or if their compiler is not installed."""
    if target.topology:
        return tpus.compile_only_devices(target.topology, target.slices)
    kind = target.name.partition(":")[0]
    if kind not in gpus.GPUS or _is_local(target) or not gpus.has_compiler():
        return None
    return gpus.compile_only_devices(kind, target.num_devices, target.memory)


def _is_local(target: devices.Target) -> bool:
    """Whether the first device of this machine is of the target's kind."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    return jax.default_backend() != "cpu" and target.name.partition(":")[0].partition("-")[0] in kind


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
