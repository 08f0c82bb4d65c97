"""The product with a kernel in four bits against float64, in plain JAX and in Pallas's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.kernels.four_bit_matmul import gpu
from lowrank.kernels.four_bit_matmul.dispatch import four_bit_matmul
from lowrank.weights.quantized.lookup_tables import TABLES
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close
from tests.support.gpu_interpreter import interpreted

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


@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "dtype", "relative", "block"),
    [
        ("nf4", 3, (200, 130), jnp.bfloat16, 1e-2, 64),
        ("nf4", 1, (64, 1), jnp.bfloat16, 1e-2, 16),
        ("int4", 64, (520, 7), jnp.float16, 2e-3, 256),
    ],
)
def test_the_gpu_body_meets_the_decoded_kernel(scheme, rows, shape, dtype, relative, block):
    x, w = case(scheme, rows, shape, dtype, block)
    body = functools.partial(gpu.multiply, levels=LEVELS[scheme], block=block)
    with interpreted():
        y = jax.jit(body)(x, w.codes, w.scale)
    assert y.dtype == dtype
    assert_close(np.asarray(y, np.float64), np.float64(x) @ np.float64(w.materialize()), relative=relative)


@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "block"),
    [("nf4", 16, (4096, 14336), 64), ("int4", 64, (4096, 4096), 128), ("nf4", 1, (100, 7), 1024)],
)
def test_the_gpu_body_lowers(scheme, rows, shape, block):
    blocks = -(-shape[0] // block)
    arrays = [
        jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16),
        jax.ShapeDtypeStruct((blocks * block // 2, shape[1]), jnp.uint8),
        jax.ShapeDtypeStruct((blocks, shape[1]), jnp.float32),
    ]
    run = functools.partial(four_bit_matmul, levels=LEVELS[scheme], block=block, implementation="pallas_gpu")
    assert "mosaic_gpu" in jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


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


@pytest.mark.parametrize(("rows", "dtype"), [(65, jnp.bfloat16), (2, jnp.float32)])
def test_what_the_gpu_body_cannot_take_is_refused(rows, dtype):
    x, w = case("nf4", rows, (64, 8), dtype)
    with pytest.raises(UserError, match=f"float16 and a batch to 64, not {x.dtype} and {rows}: use 'xla'"):
        multiply(x, w, "nf4", "pallas_gpu")
