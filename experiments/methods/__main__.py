"""Compares all methods on two tasks: `python -m experiments.methods [--quick] [--task=T] [--rows=a,b] [--phases=p]`.

Runs every cell that is not there yet, first those for scores, then those for timing, which want an idle machine; shows
progress, and rewrites the table and the plot. Kill it and start it again: cells that are done stay. `--quick` is two
steps, one rate, one seed, in `runs/`; `--phases=` runs nothing and rewrites the table. `--renew` also runs the scores
again whose row has other formulas by now (`Row.formulas`).
"""

import dataclasses

from absl import app

from experiments.methods import table
from experiments.methods.catalogue import catalogue
from experiments.study.run import main, untrained
from experiments.study.study import Study
from lowrank.core import files


def write(study: Study) -> None:
    """The table and the plot from the cells there are, and the catalogue of methods."""
    study = dataclasses.replace(study, renew=False)  # the table also has the scores that are still to be renewed
    table.write(study, table.rows(study, lambda task: untrained(study, task)["known"]))
    if not study.quick:
        files.write_json(study.results / "catalogue.json", catalogue())


if __name__ == "__main__":
    app.run(lambda argv: main("methods", write))
