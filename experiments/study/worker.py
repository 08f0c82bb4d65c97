"""The worker of a study: it runs the missing cells of one row in its own process, whose peak memory is the row's.

`python -m experiments.study.worker STUDY PHASE TASK ROW RESULTS [quick] [renew]` prints one line of JSON per cell.
"""

import json
import sys
import tempfile
import time

from experiments.study import BEGAN
from experiments.study.compute_cost import add_core_seconds
from experiments.study.stages import PHASES
from experiments.study.study import load_study
from experiments.study.tasks import TASKS
from lowrank.core.compilation_cache import keep_programs
from lowrank.core.errors import UserError


def main(argv: list[str]) -> int:
    """Runs the cells; returns the exit code, which is 2 for bad input."""
    (study, phase, task, name, results, *flags), since = argv, BEGAN
    with tempfile.TemporaryDirectory() as programs:
        keep_programs(programs)
        try:
            loaded = load_study(study, "quick" in flags, results, "renew" in flags)
            for cell in PHASES[phase](loaded, TASKS[task], name):
                now = time.monotonic()
                numbers = {key: value for key, value in add_core_seconds(cell, now - since).items() if key != "config"}
                print(json.dumps({"cell": cell.path.stem, **numbers}), flush=True)
                since = now
        except UserError as e:
            print(f"error: {task}/{name}: {e}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
