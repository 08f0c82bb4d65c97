"""Runs the study: see `experiments.protocol.row_by_row`. A row of LoRA also scores its base untuned."""

import sys

from experiments.protocol.row_by_row import Task, main
from experiments.quantization import bases, headlines, table, topics

TASKS = {
    "topics": Task(topics.EXPERIMENT, prepare=bases.measure),
    "headlines": Task(headlines.EXPERIMENT, prepare=bases.measure),
}

if __name__ == "__main__":
    sys.exit(main("quantization", TASKS, table.write, sys.argv[1:]))
