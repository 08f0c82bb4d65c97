"""What a TPU's compiler makes of our programs, ahead of time and without a TPU."""

import json
import os
import subprocess
import sys

import pytest

from launch import preflight as command
from lowrank.kernels import dispatch
from lowrank.memory import tpus


@pytest.mark.parametrize(
    ("scheme", "rows", "moved"),
    [("nf4", "64", (45e6, 110e6)), ("nf4", "8192", (0.6e9, 1.2e9)), ("int4", "8192", (0.6e9, 1.2e9))],
)
def test_a_large_product_and_its_gradient_make_no_copy_of_the_kernel(scheme, rows, moved):
    """A 4096 x 14336 kernel is 235 MB in float32; a program's temporaries stay below 32 MB in all, on a v5e.

    The bytes moved, forward and for the gradient, are at least those of the rows in and out, codes and scales: 336 MB
    for 8192 of them. Each tile of the kernel reads the rows again, unless VMEM holds them.
    """
    environment = os.environ | tpus.environment("v5e:4x4")
    words = [sys.executable, "-m", "tests.support.large_product", "v5e", scheme, rows]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    temporaries, bytes_moved = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert max(temporaries) < 32e6
    assert bytes_moved[0] < moved[0]
    assert bytes_moved[1] < moved[1]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_compile_and_take_what_their_results_say(chip):
    """`auto` takes the Pallas bodies of many adapters and few rows; the loss of a chunk's logits needs no more.

    The gradients through a kernel and its low-rank update make no temporary as large as the rows, which are 17 MB.
    """
    words = [sys.executable, "-m", "tests.support.compiled_kernels", chip]
    environment = os.environ | tpus.environment(f"{chip}:2x2")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kind"] in dispatch.SHOWN
    assert found["grouped_lora"]
    assert found["nf4_decoding"]
    assert found["lora_gradient"]
    assert found["lora_temporary"] < 2e6
    if chip == "v5e":
        assert found["temporary"] < 530e6
        assert found["products"] < 2.01


def test_a_run_is_planned_for_a_slice(files, capfd):
    model, records = files / "llama", files / "records.jsonl"
    there = [f"--config.model.name={model}", f"--config.data.source=jsonl:{records}", "--config.model.quantize=nf4"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--topology=v5e:2x2", "--json"]
    assert command.main(["--config=configs/tiny.py", *there, *mesh]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["compiled"]["platform"] == "TPU v5 lite"
    assert found["memory_bytes"] == 16 * 2**30
    assert found["fits"] is True
