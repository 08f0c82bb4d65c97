"""Runs the study: see `experiments.federated.command`."""

import sys

from experiments.federated.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
