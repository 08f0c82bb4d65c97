"""Says whether a run fits: `python -m launch.preflight --config=FILE.py[:ARG] [--config.a.b=c ...] [options]`.

    --device=h100[:8]    the device that it is for, and how many; without one, those that jax has here
                         (to compile for a GPU that is not here: pip install 'jax[cuda12-local]')
    --topology=v5e:4x4   compile for a TPU slice, on a machine without one (needs the extra `tpu`)
    --json               the same for machines

    python -m launch.preflight --table               the literature's figures beside ours
    python -m launch.preflight formats [VALUE ...]   what a value becomes in each number format

No weights are read. Bad input is one line on stderr and exit code 2.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from experiments.plan import literature, number_formats
from launch import command
from lowrank.core import config_file
from lowrank.core.errors import UserError
from lowrank.memory import advice, compiled, devices, formulas, gpus, report
from lowrank.memory.shapes import step_inputs
from lowrank.training import build

HIDDEN = "--worker"  # in the process that a slice, or several devices, are compiled in


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the usage."""
        raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`(options, the words of --config.a.b=c)`. Raises UserError."""
    parser = _Parser("python -m launch.preflight", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for flag in ("--config", "--topology", "--device"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--json", "--table", HIDDEN):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    changes = [word for word in argv if word.startswith("--config.")]
    return parser.parse_args([word for word in argv if word not in changes]), changes


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        args, changes = parse(argv)
        if args.words:
            print(_formats(args))
        elif args.table:
            print(_printed(args, literature.rows(), literature.text))
        else:
            return _plan(args, changes, argv)
    except UserError as e:
        return command.print_error(e)
    return 0


def _formats(args: argparse.Namespace) -> str:
    if args.words[0] != "formats":
        raise UserError(f"{args.words[0]!r} is not a command: it is `formats`, or --config=FILE.py, or --table")
    return _printed(args, number_formats.rows(args.words[1:]), number_formats.text)


def _printed(args: argparse.Namespace, rows: Any, text: Any) -> str:
    return json.dumps(rows, indent=2) if args.json else text(rows)


def _plan(args: argparse.Namespace, changes: Sequence[str], argv: Sequence[str]) -> int:
    if not args.config:
        raise UserError("--config=FILE.py is required (or --table, or formats)")
    if args.topology and args.device:
        raise UserError("--topology and --device are two ways to say it: give one")
    target = devices.topology(args.topology) if args.topology else args.device and devices.device(args.device)
    if target and not args.worker and (target.topology or target.count > 1):
        return _in_a_process_of_its_own(target, argv)
    print(_printed(args, *_report(_config(args.config, changes), target)))
    return 0


def _config(spec: str, changes: Sequence[str]) -> Any:
    config = config_file.load_config(spec)
    for word in changes:
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"{word} is not --config.KEY=VALUE")
        config_file.override_value(config, name, value)
    return config


def _in_a_process_of_its_own(target: devices.Target, argv: Sequence[str]) -> int:
    """What a slice or several devices need is set before jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={target.count}"
    more = devices.tpu_environment(target) if target.topology else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if target.topology and not importlib.util.find_spec("libtpu"):
        raise UserError("--topology compiles with libtpu, which is not installed: pip install 'lowrank[tpu]'")
    words = [sys.executable, "-m", "launch.preflight", HIDDEN, *argv]
    return subprocess.run(words, env={**os.environ, **more}, check=False).returncode


def _report(config: Any, target: devices.Target | None) -> tuple[Any, Any]:
    """What to print as JSON, and a function that makes the text of it."""
    there = target and _elsewhere(target)
    plan = build.build_run(config, there)
    native = target is None or bool(there) or _is_here(target)
    target = target or devices.here(list(plan.mesh.devices.flat))
    arrays = step_inputs(plan)
    by_formula, by_compiler = formulas.memory(plan, arrays), _compiled(plan, arrays, target)
    found = report.Report(plan, target, by_formula, by_compiler, native, [])
    if not found.fits:
        room = target.memory * min(1.0, by_formula.peak / found.needed)  # as far as the formula can tell
        found = report.Report(plan, target, by_formula, by_compiler, native, advice.advise(plan, int(room)))
    return report.plain(found), lambda _: report.text(found)


def _compiled(plan: Any, arrays: Any, target: devices.Target) -> Any:
    try:
        return compiled.compiled(plan, arrays)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"the run does not compile for {target.name}: {str(e).splitlines()[0]}") from e


def _elsewhere(target: devices.Target) -> list[Any] | None:
    """The devices of the target, to compile for; None if they are here, or have no compiler here."""
    if target.topology:
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices)
    kind = target.name.partition(":")[0]
    if kind not in gpus.GPUS or _is_here(target) or not gpus.installed():
        return None
    return gpus.devices(kind, target.count, target.memory)


def _is_here(target: devices.Target) -> bool:
    """Whether jax's first device is one of the target's kind."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    return jax.default_backend() != "cpu" and target.name.partition(":")[0].partition("-")[0] in kind


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
