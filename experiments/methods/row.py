"""Runs what is missing of one row, in a process of its own so that peak memory is the row's.

`python -m experiments.methods.row PHASE TASK ROW RESULTS RUNS [quick]`; a line of JSON for each cell that is done.
"""

import json
import sys
from pathlib import Path

from experiments.methods.cells import PHASES, Study
from experiments.methods.tasks import TASKS
from lowrank.errors import UserError


def main(argv: list[str]) -> int:
    """The exit code: 0, or 2 for bad input."""
    phase, task, name, results, runs, *rest = argv
    study = Study(Path(results), Path(runs), quick=rest == ["quick"])
    try:
        for cell in PHASES[phase](study, TASKS[task], name):
            numbers = {key: value for key, value in cell.read().items() if key != "config"}
            print(json.dumps({"cell": cell.path.stem, **numbers}), flush=True)
    except UserError as e:
        print(f"error: {task}/{name}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
