"""The state of a study: `python -m launch.status FOLDER`, from any machine that sees the folder.

    --tables=DIR    write the results, table.csv, table.md, table.tex and report.html, to DIR

Nothing is written to the study's folder. The exit code is 0.
"""

import sys
from collections.abc import Sequence

from launch import command
from lowrank.core.errors import UserError
from lowrank.core.paths import as_path
from lowrank.sweeps import tables
from lowrank.sweeps.folder import read_folder
from lowrank.sweeps.report_page import write_page
from lowrank.sweeps.status import Status


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = command.Parser("python -m launch.status", __doc__)
    parser.add_argument("folder")
    parser.add_argument("--tables")
    try:
        args = parser.parse_args(argv)
        status = Status(read_folder(as_path(args.folder)))
        print(status.text())
        if args.tables:
            where = as_path(args.tables)
            paths = tables.write_tables(status.study, status.results, where)
            paths.append(write_page(status.study, status.results, where))
            print("\ntables:", ", ".join(map(str, paths)))
    except (OSError, UserError) as e:
        return command.print_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
