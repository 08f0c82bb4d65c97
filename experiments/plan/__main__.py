"""The plan that the project's README shows: `python -m experiments.plan`. Writes `results/t4.txt`."""

import os
import subprocess
import sys
from pathlib import Path

from lowrank.core.files import write_text

RESULTS = Path(__file__).parent / "results" / "t4.txt"
WORDS = ("--config=configs/quickstart.py", "--config.data.batch_size=256", "--device=t4")


def sample() -> str:
    """What `python -m launch.preflight` says with these words, on one device."""
    alone = {**os.environ, "XLA_FLAGS": ""}  # no simulated devices
    command = [sys.executable, "-m", "launch.preflight", *WORDS]
    return subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    print(write_text(RESULTS, sample()).read_text())
