"""What a TPU's compiler makes of kernels: `python -m tests.support.compiled_kernels v5e|v6e` prints a JSON object."""

import json
import sys

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.bench.kernels import KERNELS
from lowrank.core.weight import dot
from lowrank.kernels.grouped_lora.dispatch import grouped_lora

MANY = {"rows": 40, "adapters": 256, "rank": 16, "inputs": 512, "outputs": 256}
SQUARE = {"rows": 2048, "inputs": 4096, "outputs": 4096, "rank": 16}
FEW = {"rows": 16, "inputs": 4096, "outputs": 14336}
LONG = {"batch": 8, "time": 1024, "width": 4096, "vocabulary": 128256}


def main(kind):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:2x2").devices[:1]
    place = NamedSharding(jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=devices), PartitionSpec())

    def compiled(name, function, size):
        shapes = KERNELS[name].shapes(size)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        return jax.jit(function).lower(*arguments).compile()

    lora = {
        form: compiled("lora_gradient", KERNELS["lora_gradient"].forms[form], SQUARE) for form in ("xla", "pallas_tpu")
    }
    texts = {
        "lora_gradient": lora["pallas_tpu"].as_text(),
        "grouped_lora": compiled("grouped_lora", grouped_lora, MANY).as_text(),
        "nf4_decoding": compiled("nf4_decoding", dot, FEW).as_text(),
    }
    found = {name: "tpu_custom_call" in text for name, text in texts.items()}
    found["lora_temporary"] = lora["xla"].memory_analysis().temp_size_in_bytes
    if kind == "v5e":
        program = compiled("cross_entropy", KERNELS["cross_entropy"].forms["xla"], LONG)
        chunks, product = LONG["time"] * LONG["batch"] // 1024, 2 * LONG["time"] * LONG["batch"]
        found["temporary"] = program.memory_analysis().temp_size_in_bytes
        found["products"] = program.cost_analysis()["flops"] * chunks / product / LONG["width"] / LONG["vocabulary"]
    print(json.dumps({"kind": devices[0].device_kind, **found}))


if __name__ == "__main__":
    main(sys.argv[1])
