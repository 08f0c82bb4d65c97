"""Runs the study: see `experiments.merging.command`."""

import sys

from experiments.merging.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
