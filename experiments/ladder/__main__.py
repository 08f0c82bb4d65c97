"""Runs the study: see `experiments.protocol.command`."""

import sys

from experiments.ladder.study import EXPERIMENT
from experiments.protocol.command import main

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, sys.argv[1:]))
