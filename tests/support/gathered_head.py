"""`python -m tests.support.gathered_head`: the bytes that a TPU slice gathers for a chunked loss, and the head's.

The program is the gradient of the hidden states, compiled for four v5e chips that shard the rows and the frozen head.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core import sharding
from lowrank.kernels.cross_entropy import chunked_nll
from lowrank.memory import tpus
from lowrank.memory.collectives import collectives

ROWS, TOKENS, WIDTH, VOCAB, CHUNKS = 4, 1024, 1024, 32768, 4


def program():
    mesh = sharding.make_mesh_of_devices(tpus.compile_only_devices("v5e:2x2"), data=1, fsdp=4)
    at = NamedSharding(mesh, PartitionSpec("fsdp"))
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)  # noqa: E731
    h, head = place((ROWS, TOKENS, WIDTH), jnp.bfloat16), place((WIDTH, VOCAB), jnp.bfloat16)
    targets, weights = place((ROWS, TOKENS), jnp.int32), place((ROWS, TOKENS), jnp.float32)

    def loss(h, head, targets, weights):
        return chunked_nll(lambda x: x @ head, h, targets, weights, ROWS * TOKENS // CHUNKS)

    with sharding.mesh_context(h):
        return jax.jit(jax.grad(loss)).lower(h, head, targets, weights).compile()


if __name__ == "__main__":
    moved = collectives(program().as_text(), CHUNKS)
    print(sum(of.bytes for of in moved.values()), 2 * WIDTH * VOCAB)
