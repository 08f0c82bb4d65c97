"""Grouped products against loops in float64, and their gradients against those of `jax.lax.ragged_dot`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.kernels.grouped_matmul import dispatch
from tests.support.close import assert_close

IN, OUT = 5, 7


def case(sizes, rows):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, IN), (len(sizes), IN, OUT)))
    return x, w, np.int32(sizes)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [([9, 0, 14, 1], 24), ([0, 0, 3], 3), ([1, 1], 2), ([200, 3, 0, 61, 5], 269), ([2, 5, 0], 12), ([4], 4)],
)
@pytest.mark.parametrize("product", [dispatch.ragged_dot, dispatch.ragged_dot_in_steps])
def test_each_row_meets_the_matrix_of_its_group(product, sizes, rows):
    x, w, counts = case(sizes, rows)
    expected, group = np.zeros((rows, OUT)), np.repeat(np.arange(len(sizes)), sizes)
    for i, g in enumerate(group):
        expected[i] = np.asarray(x[i], np.float64) @ np.asarray(w[g], np.float64)
    assert_close(jax.jit(product)(x, w, counts), expected)


@functools.partial(jax.jit, static_argnums=0)
def gradients(product, x, w, counts):
    return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w, counts))), argnums=(0, 1))(x, w)


@pytest.mark.parametrize("product", [dispatch.ragged_dot, dispatch.ragged_dot_in_steps])
@pytest.mark.parametrize(("sizes", "rows"), [([9, 0, 14, 1], 26), ([200, 3, 0, 61, 5], 269), ([128, 128], 256)])
def test_gradients_are_those_of_the_plain_product(product, sizes, rows):
    arrays = case(sizes, rows)
    for ours, plain in zip(gradients(product, *arrays), gradients(jax.lax.ragged_dot, *arrays), strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("product", [dispatch.ragged_dot_in_blocks, dispatch.ragged_dot_in_steps])
def test_the_gradient_of_a_matrix_is_summed_in_float32(product):
    x, w, counts = case([300, 2], 302)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    ours = np.asarray(jax.jit(jax.grad(lambda w, x, counts: jnp.sum(product(x, w, counts))))(w, x, counts))
    summed = np.float64(x)[:300].sum(0)
    assert_close(ours[0], np.tile(summed[:, None], OUT), relative=0.01)


def test_a_cpu_multiplies_by_one_matrix_a_block():
    x, w, counts = (np.zeros((512, 64), np.float32), np.zeros((8, 64, 64), np.float32), np.full(8, 64, np.int32))
    text = jax.jit(dispatch.ragged_dot).lower(x, w, counts).as_text()
    assert "64x64xf32" in text
    assert "8x512x64" not in text
