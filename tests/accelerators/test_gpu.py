"""What a GPU's compiler makes of our programs, ahead of time and without a GPU."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from launch import preflight as command
from lowrank.kernels.grouped_matmul import dispatch
from lowrank.memory import gpus

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
MEMORY = 80 * 2**30


def test_a_large_product_and_its_gradient_make_no_copy_of_the_kernel():
    """A 4096 x 14336 kernel is 235 MB in float32; a program's temporaries stay below 32 MB in all, on an H100."""
    words = [sys.executable, "-m", "tests.support.large_product", "h100", "nf4", "64"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split())) < 32e6


def test_a_grouped_product_does_not_write_its_rows_once_a_group():
    rows, groups, width, out = 4096, 16, 2048, 1024
    at = SingleDeviceSharding(gpus.compile_only_devices("h100", 1, MEMORY)[0])
    shapes = ((rows, width), jnp.bfloat16), ((groups, width, out), jnp.bfloat16), ((groups,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=at) for shape in shapes]
    program = jax.jit(dispatch.ragged_dot).lower(*arrays).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3 * 2 * rows * width


@pytest.mark.parametrize("device", ["h100", "a100:4"])
def test_a_run_is_planned_for_a_gpu(files, capfd, device):
    model, records = files / "llama", files / "records.jsonl"
    there = [f"--config.model.name={model}", f"--config.data.source=jsonl:{records}", "--config.model.quantize=nf4"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"] if device.endswith(":4") else []
    assert command.main(["--config=configs/tiny.py", *there, *mesh, f"--device={device}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["compiled"]["platform"] == gpus.GPUS[device.partition(":")[0]].name
    assert found["compiled"]["native"] is True
    assert found["memory_bytes"] == MEMORY
    assert found["fits"] is True


def test_what_a_gpu_cannot_do_is_said(files, capfd):
    model, records = files / "llama", files / "records.jsonl"
    there = [f"--config.model.name={model}", f"--config.data.source=jsonl:{records}", "--config.model.dtype=bfloat16"]
    assert command.main(["--config=configs/tiny.py", *there, "--device=t4"]) == 2
    assert "does not compile for t4: UNIMPLEMENTED: Unsupported algorithm" in capfd.readouterr().err
