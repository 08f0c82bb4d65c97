"""Runs the study: see `experiments.long_context.command`."""

import sys

from experiments.long_context.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
