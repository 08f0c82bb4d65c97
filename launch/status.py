"""The state of a study, or of a run in stages: `python -m launch.status FOLDER`, from any machine that sees the folder.

    --tables=DIR    write the results of a study to DIR: table.csv, .md and .tex, report.html, hparams for TensorBoard

Nothing is written to the study's folder. The exit code is 0.
"""

import sys
from collections.abc import Sequence

from launch import command
from lowrank.core.errors import UserError
from lowrank.core.paths import as_path
from lowrank.sweeps.folder import read_folder
from lowrank.sweeps.outputs import write_outputs
from lowrank.sweeps.status import Status
from lowrank.training import stage_report, stages


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = command.Parser("python -m launch.status", __doc__)
    parser.add_argument("folder")
    parser.add_argument("--tables")
    try:
        args = parser.parse_args(argv)
        if staged := stages.recorded(args.folder):
            print(stage_report.status(as_path(args.folder), staged))
            return 0
        status = Status(read_folder(as_path(args.folder)))
        print(status.text())
        if args.tables:
            paths = write_outputs(status.study, status.results, as_path(args.tables))
            print("\ntables:", ", ".join(map(str, paths)))
    except (OSError, UserError) as e:
        return command.print_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
