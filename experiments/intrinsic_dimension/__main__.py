"""Runs the study: see `experiments.intrinsic_dimension.command`."""

import sys

from experiments.intrinsic_dimension.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
