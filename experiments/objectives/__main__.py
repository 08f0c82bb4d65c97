"""Runs the study: see `experiments.objectives.command`."""

import sys

from experiments.objectives.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
