"""The product with a kernel in four bits against float64, in plain JAX and in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.kernels.four_bit_matmul.dispatch import four_bit_matmul
from lowrank.weights.quantized.lookup_tables import TABLES
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close

LEVELS = {"nf4": tuple(map(float, TABLES["nf4"])), "int4": tuple(float(i - 8) for i in range(16))}


def case(scheme, rows, shape, dtype, block=64):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, shape[0]), shape))
    return x, SCHEMES[scheme](block=block)(w)


def multiply(x, w, scheme, implementation):
    return four_bit_matmul(x, w.codes, w.scale, levels=LEVELS[scheme], block=w.block, implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "dtype", "relative", "block"),
    [
        ("nf4", 3, (200, 130), jnp.float32, 5e-6, 64),
        ("int4", 64, (1088, 520), jnp.bfloat16, 1e-2, 64),
        ("nf4", 1, (64, 1), jnp.bfloat16, 1e-2, 16),
        ("int4", 17, (100, 7), jnp.float16, 2e-3, 128),
    ],
)
def test_rows_meet_the_decoded_kernel(implementation, scheme, rows, shape, dtype, relative, block):
    x, w = case(scheme, rows, shape, dtype, block)
    y = jax.jit(multiply, static_argnums=(2, 3))(x, w, scheme, implementation)
    assert y.dtype == dtype
    assert_close(np.asarray(y, np.float64), np.float64(x) @ np.float64(w.materialize()), relative=relative)


def test_the_gradient_decodes_again():
    x, w = case("nf4", 5, (200, 30), jnp.float32)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(multiply(x, w, "nf4", "interpret"))))(x)
    exact = np.float64(w.materialize())
    assert_close(ours, np.cos(np.float64(x) @ exact) @ exact.T)


def test_blocks_that_a_body_cannot_take_are_refused():
    x, w = case("nf4", 2, (96, 8), jnp.float32, block=24)
    assert_close(multiply(x, w, "nf4", "auto"), np.float64(x) @ np.float64(w.materialize()))
    with pytest.raises(UserError, match="blocks of 16 to 1024 rows that are a power of two, not 24: use 'xla'"):
        multiply(x, w, "nf4", "interpret")
