"""Temporary bytes of a 4096 x 14336 product of codes as compiled, and the bytes that it moves to and from HBM.

As a command, `python -m tests.support.large_product v5e|h100 SCHEME ROWS`, for a device that is not there: the
temporary bytes of the forward product and of the gradient of its inputs, then the bytes that a TPU program moves.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.bench.hbm_bytes import hbm_bytes
from lowrank.core.weight import dot
from lowrank.memory import gpus
from lowrank.weights.quantized.schemes import SCHEMES

SHAPE = (4096, 14336)


def programs(device, scheme, rows, **options):
    """`[forward, gradient of the inputs]`, compiled."""

    def place(tree):
        at = SingleDeviceSharding(device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)

    def back(x, g, w):
        return jax.vjp(lambda x: dot(x, w), x)[1](g)

    w = place(jax.eval_shape(lambda w: SCHEMES[scheme](**options)(w), jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)))
    x, g = (place(jax.ShapeDtypeStruct((rows, n), jnp.bfloat16)) for n in SHAPE)
    lowered = jax.jit(dot).lower(x, w), jax.jit(back).lower(x, g, w)
    return [program.compile() for program in lowered]


def temporaries(compiled):
    return [program.memory_analysis().temp_size_in_bytes for program in compiled]


def elsewhere(name):
    if name == "h100":
        return gpus.compile_only_devices(name, 1, 80 * 2**30)[0]
    from jax.experimental import topologies  # loads libtpu

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices[0]


if __name__ == "__main__":
    kind, scheme, rows = sys.argv[1:]
    double = {"double": True} if scheme == "nf4" else {}
    compiled = programs(elsewhere(kind), scheme, int(rows), **double)
    print(*temporaries(compiled))
    print(*(hbm_bytes(program.as_text()) for program in compiled if kind == "v5e"))
