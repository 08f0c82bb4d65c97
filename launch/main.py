"""Fine-tunes a model: `python -m launch.main --config=configs/X.py[:arg] --workdir=DIR [--config.a.b=c ...]`.

The exit code is 0 for a run that is done, whose `summary.json` then exists; 42 for a run that SIGTERM or SIGINT has
stopped after it saved, or whose folder another run holds, which the same command continues; 2 for bad input and 3 for a
loss that is not finite, each with one line on stderr. Several processes form one run by `--local_processes=N` on one
machine, by `--config.distributed=True` on a cluster that JAX knows, and by `--coordinator_address`, `--num_processes`
and `--process_id` on any other. A config with `stages` runs them one after another, each in a folder of its own.
"""

import shlex
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections.config_flags import config_flags

from launch import command, processes
from lowrank.core import config_file
from lowrank.core.compilation_cache import FOLDER, keep_programs
from lowrank.core.errors import InUse, UserError
from lowrank.core.exit_codes import STOPPED
from lowrank.core.paths import expand
from lowrank.training import loop, stages

# New keys are accepted so that options that the file does not list can be set; the dataclasses refuse unknown keys.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file; its argument after a colon.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, logs, report and adapter.")

_PROGRAMS = flags.DEFINE_string(
    "programs", FOLDER, "The folder of compiled programs; empty: each run compiles its own."
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "The number of steps to trace, after the first one, into WORKDIR/profile, which xprof opens."
)
REFUSE, STOP = "refuse", "stop"
_IN_USE = flags.DEFINE_enum(
    "in_use",
    REFUSE,
    [REFUSE, STOP],
    "Where another run holds the folder: refuse, with exit code 2, or stop, with 42, which workers try again.",
)


def main(argv: Sequence[str]) -> int:
    """Runs the training that the flags describe; returns the exit code."""
    del argv
    if (code := processes.launched()) is not None:
        return code
    config = _CONFIG.value.lock()
    if _PROGRAMS.value:
        keep_programs(_PROGRAMS.value)
    try:
        processes.connect(config.get("distributed", False) is True)
        again = shlex.join(["python", "-m", "launch.main", *sys.argv[1:]])
        run = stages.run if stages.STAGES in config else loop.run
        summary = run(config, _WORKDIR.value, command=again, profile=_PROFILE.value)
    except InUse as e:
        code = command.print_error(e)
        return STOPPED if _IN_USE.value == STOP else code
    except UserError as e:
        command.fail(e)
    return STOPPED if "stopped_at" in summary else 0


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parser for `app.run`; an error in a flag is one line, where absl and ml_collections print pages."""
    try:
        argv = _with_config_expanded(argv)
        _make_groups(argv)
        rest = command.parse(argv)
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise UserError("--config=FILE and --workdir=DIR are both required")
        return rest
    except UserError as e:
        return command.fail(e)


def _with_config_expanded(argv: Sequence[str]) -> list[str]:
    """The words with `~` and variables in the name of the config file written out."""
    words = list(argv)
    for i, word in enumerate(words):
        if word.startswith("--config="):
            words[i] = f"--config={expand(word.removeprefix('--config='))}"
        elif words[i - 1] == "--config":
            words[i] = expand(word)
    return words


def _make_groups(argv: Sequence[str]) -> None:
    """Has the config flag make the groups of the overrides. Raises UserError for a config or a group that is wrong."""
    words = [arg.lstrip("-").partition("=") for arg in argv[1:]]
    names = [name for name, _, _ in words]
    if "config" not in names:
        return
    at = names.index("config")
    config = config_file.load_config(words[at][2] or "".join(argv[at + 2 : at + 3]))  # --config=FILE or --config FILE
    overrides = [name for name in names if name.startswith("config.")]
    for name in overrides:
        config_file.make_groups(config, name)
    flags.FLAGS["config"].parser = config_file.GroupParser(overrides)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
