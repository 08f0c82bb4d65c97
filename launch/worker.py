"""A worker of a study: `python -m launch.worker FOLDER`. Any number of them may work on a folder, on any machines.

    --cores=0,1    the cores that the worker and its runs may use; by default those that the machine allows
    --group=NAME --process=0   one of the processes that are one worker, on the hosts of its slices (`worker_group`)

It runs one cell after another until none is left, each by `launch.main` as a process. The exit code is 0 when no cell
is left, and 42 if SIGTERM or SIGINT has come: the cell has saved, and whoever claims it continues it.
"""

import os
import sys
from collections.abc import Sequence

from launch import command, recorded, worker_group
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath, as_path
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.folder import RECORD, StudyFolder, read_folder
from lowrank.sweeps.worker import Worker


def run_command(study: StudyFolder, cell: Cell) -> list[str]:
    """The command that runs a cell of a study by `launch.main`."""
    config = f"{recorded.__file__}:{study.path / RECORD}:{cell.key}"
    words = [f"--config={config}", f"--workdir={study.run_path(cell.key)}", "--in_use=stop"]
    return [sys.executable, "-m", "launch.main", *words]


def worker_command(folder: AnyPath) -> list[str]:
    """The command that starts a worker on this machine."""
    return [sys.executable, "-m", "launch.worker", str(folder)]


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = command.Parser("python -m launch.worker", __doc__)
    parser.add_argument("folder")
    parser.add_argument("--cores", default="")
    parser.add_argument("--group", default="")
    parser.add_argument("--process", type=int, default=-1)
    try:
        args = parser.parse_args(argv)
        if args.cores:
            use_cores(args.cores)
        if bool(args.group) != (args.process >= 0):
            raise UserError("--group=NAME and --process=INDEX, from 0 on, belong together: give both or neither")
        study = read_folder(as_path(args.folder))
        if args.process > 0:
            return worker_group.Follower(study, args.group, args.process, run_command, say).run()
        if args.group:
            return worker_group.lead(study, args.group, run_command, say)
        return Worker(study, run_command, say).run()
    except (OSError, UserError) as e:
        return command.print_error(e)


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def use_cores(text: str) -> None:
    """Restricts this process and those that it starts to the cores `0,1`. Raises UserError for cores that it lacks."""
    try:
        os.sched_setaffinity(0, {int(core) for core in text.split(",")})
    except (ValueError, OSError, AttributeError):
        raise UserError(f"--cores={text} is not a list of cores of this machine, such as 0,1") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
