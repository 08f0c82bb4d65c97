"""The memory report that the project's pages show: `python -m experiments.plan` writes `results/t4.txt`."""

import os
import subprocess
import sys
from pathlib import Path

from lowrank.core.files import write_text

RESULTS = Path(__file__).parent / "results" / "t4.txt"
WORDS = ("--config=configs/quickstart.py", "--config.data.batch_size=256", "--device=t4")


def sample() -> str:
    """The output of `python -m launch.preflight` with these flags, on one device: the run does not fit."""
    alone = {**os.environ, "XLA_FLAGS": ""}  # no simulated devices
    command = [sys.executable, "-m", "launch.preflight", *WORDS]
    done = subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1, done
    return done.stdout


if __name__ == "__main__":
    print(write_text(RESULTS, sample()).read_text())
