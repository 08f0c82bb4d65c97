"""Stacked layers: the ranks of their adapters, and decompositions of several stacks in one program."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.weights import lora, stacked_layers
from tests.support.close import assert_close

PROGRAM = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # the size of the thread pool
import jax, jax.numpy as jnp
from lowrank.weights import stacked_layers as stacks
def all(x, y):
    return [stacks.apply_per_matrix(jnp.linalg.qr, v) for v in (x, y, x + y)]
x = jax.random.normal(jax.random.key(0), (6, 384, 384))
for i in range(2):
    jax.block_until_ready(jax.jit(all)(x + i, x + 1))
print("done")
"""


def test_several_batched_decompositions_in_one_program_end():
    # In a process of its own, of one device: a program that waits for ever cannot be stopped from within.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    assert done.stdout == "done\n"


def test_each_is_the_function_of_each_matrix_and_so_is_its_gradient():
    x = 0.1 * jax.random.normal(jax.random.key(0), (3, 2, 5, 5)) + jnp.broadcast_to(jnp.eye(5), (3, 2, 5, 5))
    y = jax.random.normal(jax.random.key(1), (3, 2, 5, 4))
    solved = jax.jit(lambda x, y: stacked_layers.apply_per_matrix(jnp.linalg.solve, x, y))
    assert_close(solved(x, y), np.linalg.solve(np.float64(x), np.float64(y)))
    ours, theirs = (jax.grad(lambda x: (f(x, y) ** 2).sum())(x) for f in (solved, jnp.linalg.solve))  # noqa: B023
    assert_close(ours, theirs)


@pytest.mark.parametrize(("init", "field", "power"), [("gaussian", "a", -1), ("zero_a", "b", -0.5)])
def test_the_spread_of_an_init_follows_the_rank_of_the_layer(init, field, power):
    kernel = jnp.zeros((3, 512, 512))
    w = lora.attach(
        jax.random.key(0), kernel, ranks=(16, 4, 0), alphas=(1.0,) * 3, rslora=False, dropout=0.0, init=init
    )
    factor = np.asarray(getattr(w, field), np.float64)
    for layer, rank in ((0, 16), (1, 4)):
        assert_close(np.std(factor[layer][factor[layer] != 0]), float(rank) ** power, relative=0.05)
    assert not np.any(factor[2])
