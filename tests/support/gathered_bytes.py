"""`python -m tests.support.gathered_bytes SCHEME`: the bytes that a TPU slice moves for a scan over two frozen kernels.

The program is the gradient of the inputs, compiled for four v5e chips that shard the rows and the kernels. `bfloat16`
is the scheme of kernels that are not quantized.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core import sharding
from lowrank.core.weight import dot
from lowrank.memory import tpus
from lowrank.memory.collectives import collectives
from lowrank.weights.quantized.schemes import SCHEMES

LAYERS, WIDTH, ROWS, TOKENS = 2, 1024, 4, 1024


def program(scheme):
    mesh = sharding.make_mesh_of_devices(tpus.compile_only_devices("v5e:2x2"), data=1, fsdp=4)
    quantize = (lambda w: w) if scheme == "bfloat16" else SCHEMES[scheme]()
    w = jax.eval_shape(lambda: quantize(jnp.zeros((LAYERS, WIDTH, WIDTH), jnp.bfloat16)))
    params = {"layers": {"mlp": {name: {"kernel": w} for name in ("up", "down")}}}
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(place, params, sharding.parameter_shardings(params, mesh))
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16)

    def layer(x, w):
        return sharding.shard_tokens(x + dot(jax.nn.silu(dot(x, w["up"]["kernel"])), w["down"]["kernel"])), None

    def loss(x, params):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, params["layers"]["mlp"])[0].astype(jnp.float32) ** 2)

    with sharding.mesh_context(params):
        return jax.jit(jax.grad(loss)).lower(place(x, NamedSharding(mesh, PartitionSpec("fsdp"))), params).compile()


if __name__ == "__main__":
    print(sum(of.bytes for of in collectives(program(sys.argv[1]).as_text()).values()))
