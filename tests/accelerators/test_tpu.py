"""What a TPU's compiler makes of our programs, ahead of time and without a TPU."""

import json
import os
import subprocess
import sys

from launch import preflight as command
from lowrank.memory import tpus


def test_a_large_product_and_its_gradient_make_no_copy_of_the_kernel():
    """A 4096 x 14336 kernel is 235 MB in float32; a program's temporaries stay below 32 MB in all, on a v5e."""
    environment = os.environ | tpus.environment("v5e:4x4")
    words = [sys.executable, "-m", "tests.support.large_product", "v5e"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split())) < 32e6


def test_a_run_is_planned_for_a_slice(files, capfd):
    model, records = files / "llama", files / "records.jsonl"
    there = [f"--config.model.name={model}", f"--config.data.source=jsonl:{records}", "--config.model.quantize=nf4"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--topology=v5e:2x2", "--json"]
    assert command.main(["--config=configs/tiny.py", *there, *mesh]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["compiled"]["platform"] == "TPU v5 lite"
    assert found["memory_bytes"] == 16 * 2**30
    assert found["fits"] is True
