"""What a TPU's compiler makes of the kernels, without a TPU: `python -m experiments.bench.tpu_kernels [--only=REGEX]`.

Each form of each size of `kernels.KERNELS` is compiled for one chip of v5e, and for one of v6e where there is a Pallas
body. Written to `results/tpu_kernels.json` after each: the bytes that the program moves to and from HBM, loops times
their trips; its temporary bytes; and its operations, where it has no loop. No time is measured or estimated.
"""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from jax.sharding import SingleDeviceSharding

from experiments.bench.hbm_bytes import hbm_bytes
from experiments.bench.kernels import KERNELS, LOGITS, Kernel, Size
from lowrank.core.files import write_json
from lowrank.memory import tpus

ONLY = flags.DEFINE_string("only", "", "A regex that is found in the keys of the programs to compile.")
OUT = Path(__file__).parent / "results" / "tpu_kernels.json"


def main(argv: list[str]) -> None:
    """Compiles the programs that are not in the file and writes what they take."""
    del argv
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    for topology in ("v5e:2x2", "v6e:2x2"):
        for name, kernel in KERNELS.items():
            for size in kernel.sizes if topology == "v5e:2x2" or "pallas_tpu" in kernel.forms else ():
                key = key_of(topology.partition(":")[0], name, size)
                if re.search(ONLY.value, key) and key not in results:
                    results[key] = {form: measure(kernel, size, form, topology) for form in kernel.forms}
                    results["versions"] = {p: metadata.version(p) for p in ("jax", "libtpu")}
                    write_json(OUT, dict(sorted(results.items())))
                    print(key, results[key], flush=True)


def key_of(chip: str, name: str, size: Size) -> str:
    """The key of a size in the results."""
    return f"{chip} {name} {' '.join(f'{k}={v}' for k, v in size.items())}"


def measure(kernel: Kernel, size: Size, form: str, topology: str) -> dict[str, Any]:
    """The bytes moved, the temporary bytes and the operations of a form as compiled."""
    from jax.experimental import topologies  # loads libtpu

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    at = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), kernel.shapes(size))
    try:
        program = jax.jit(kernel.forms[form]).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        return {"refused": str(e).partition("\n")[0][:200]}
    text, memory, cost = program.as_text(), program.memory_analysis(), program.cost_analysis()
    chunks = size.get("batch", 0) * size.get("time", 0) // LOGITS or 1
    found = {"moved": hbm_bytes(text, chunks), "temporary": memory.temp_size_in_bytes}
    return found | ({} if " while(" in text else {"operations": round(cost["flops"])})


if __name__ == "__main__":
    environment = tpus.environment("v5e:2x2")
    if any(os.environ.get(name) != value for name, value in environment.items()):
        words = [sys.executable, "-m", "experiments.bench.tpu_kernels", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | environment)
    app.run(main)
