"""The law of memory: reading a model takes at most 1.3 times its bytes, in whatever form it is stored."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import checkpoint_files as files

BIG = {
    **files.LLAMA,
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
STATUS = """
import ctypes, gc, sys, jax, pathlib
from lowrank.core import sharding
from lowrank.pretrained import load

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
"""
PROBE = f"""{STATUS}
tiny, *cases = sys.argv[1:]
for big, *axes in map(str.split, cases):
    mesh = sharding.make_mesh(*map(int, axes)) if axes else None
    load(tiny, mesh=mesh)  # what is compiled and imported once is no part of the model
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    params = jax.block_until_ready(load(big, mesh=mesh).params)
    print((status("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    del params
"""
CODED = f"""{STATUS}
for _ in range(2):  # what is compiled once is no part of the model
    params = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    params = jax.block_until_ready(load(sys.argv[1], quantized="nf4").params)
print(status("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def ones(config: dict) -> dict[str, np.ndarray]:
    """The tensors of a config, all ones: quick to make."""
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in files.shapes(config).items()}


def quantized(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The GGUF file of `arrays`, its matrices in 8 bits."""
    arrays = files.converted(arrays, "llama", 8, 8)
    metadata = files.gguf_metadata(BIG, "llama") | files.vocabulary(BIG["vocab_size"])
    return files.write_gguf(path, metadata, arrays, {name: "Q8_0" for name, x in arrays.items() if x.ndim == 2})


def test_no_model_is_in_memory_twice(tmp_path):
    arrays = ones(BIG)
    assert sum(x.size for x in arrays.values()) * 4 > 250e6
    cases = {
        "bfloat16": files.write_directory(tmp_path / "bf16", BIG, arrays, dtype="BF16"),
        "float32 over eight devices": f"{files.write_directory(tmp_path / 'f32', BIG, arrays)} 1 4 2",
        "quantized": quantized(tmp_path / "q8.gguf", arrays),
    }
    tiny = files.directory(tmp_path / "tiny", files.LLAMA)
    command = [sys.executable, "-c", PROBE, str(tiny), *map(str, cases.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = dict(zip(cases, map(float, done.stdout.split()), strict=True))
    assert all(0.8 < ratio < 1.3 for ratio in ratios.values()), ratios


def test_quantized_as_it_is_read_a_model_takes_its_codes_and_one_tensor(tmp_path):
    config = {**BIG, "vocab_size": 256}
    folder = files.write_directory(tmp_path / "bf16", config, ones(config), dtype="BF16")
    # What is freed goes back at once: what malloc would keep for later is no part of what is needed.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CODED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    tensor = 1024 * 4096 * 4
    assert int(done.stdout) < 1.3 * tensor
