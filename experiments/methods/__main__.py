"""Runs the study: see `experiments.protocol.row_by_row`. It also writes the catalogue of methods."""

import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.methods import headlines, table, topics
from experiments.methods.catalogue import catalogue
from experiments.protocol.model import right_answers
from experiments.protocol.row_by_row import Runs, Task, main
from experiments.protocol.tasks import article_perplexity, retrieval_accuracy
from lowrank.core.files import write_json

TASKS = {
    "topics": Task(topics.EXPERIMENT, lambda model: 100 * retrieval_accuracy(model), right_answers),
    "headlines": Task(headlines.EXPERIMENT, lambda model: -article_perplexity(model)),
}


def write(runs: Mapping[str, Runs], results: Path) -> str:
    """The tables and plots and, of the whole study, the catalogue of methods; returns the table in Markdown."""
    if results == topics.EXPERIMENT.results("small"):
        write_json(results / "catalogue.json", catalogue())
    return table.write(runs, results)


if __name__ == "__main__":
    sys.exit(main("methods", TASKS, write, sys.argv[1:]))
