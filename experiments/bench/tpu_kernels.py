"""What a TPU's compiler makes of the kernels, without a TPU: `python -m experiments.bench.tpu_kernels`.

Every form of each problem of `kernels` at its real size, forward alone and with the backward pass: temporary bytes, and
the bytes that the program moves to and from HBM. Added to `results/tpu.json`; what is there is not compiled again. No
time is measured or estimated.
"""

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from absl import app, flags
from jax.sharding import SingleDeviceSharding

from experiments.bench import kernels
from experiments.bench.hbm_bytes import hbm_bytes
from experiments.bench.kernels import Arrays, Problem
from experiments.bench.tpu import add, read, restart_for_tpus
from lowrank.memory import tpus

MATCHING = flags.DEFINE_string("matching", "", "A regex that is found in the keys of the kernels to compile.")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")


def main(argv: list[str]) -> None:
    """Compiles what is not in the results and writes it there."""
    del argv
    for topology in TOPOLOGIES:
        device = tpus.compile_only_devices(topology)[0]
        for name, problem in kernels.PROBLEMS.items():
            key = f"kernel {name} {topology}"
            if re.search(MATCHING.value, key) and key not in read():
                add(key, {**figures(problem, device), "versions": versions()})
                print(key, flush=True)


def versions() -> dict[str, str]:
    """The versions that decide what is compiled."""
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def figures(problem: Problem, device: Any) -> dict[str, Any]:
    """`{form: {forward and both: {temporary, moved}}}`, in bytes."""
    inputs = jax.eval_shape(problem.inputs, jax.random.key(0))
    g = jax.eval_shape(lambda *given: kernels.cotangent(problem, given, jax.random.key(0)), *inputs)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    given = jax.tree.map(place, (*inputs, g))
    return {
        name: {
            "forward": _measured(form, given[:-1]),
            "both": _measured(kernels.forward_and_backward(problem, form), given),
        }
        for name, form in problem.forms.items()
    }


def _measured(call: Callable[..., Any], given: Arrays) -> dict[str, Any]:
    try:
        program = jax.jit(call).lower(*given).compile()
    except jax.errors.JaxRuntimeError as e:
        return {"refused": str(e).splitlines()[0]}
    memory = program.memory_analysis()
    assert memory is not None
    return {"temporary": memory.temp_size_in_bytes, "moved": hbm_bytes(program.as_text() or "")}


if __name__ == "__main__":
    restart_for_tpus("experiments.bench.tpu_kernels")
    app.run(main)
