"""Kernels in the blocks of GGUF files decode to what the `gguf` package makes of the same bytes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.weight import dot, materialize
from lowrank.weights.quantized import base, ggml
from tests.support.close import assert_close

values = jax.jit(materialize)
IN, OUT, L = 512, 20, 2
EXACT = {"Q4_0", "Q4_1", "Q8_0"}  # the formats that the package also writes


def raw(name, rows=OUT, seed=0):
    """Bytes of blocks `[rows, bytes]`; where the package cannot write them they are random, with small numbers."""
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[name]
    if name in EXACT:
        return gguf.quants.quantize(rng.standard_normal((rows, IN)).astype(np.float32), kind)
    f = ggml.FORMATS[name]
    blocks = rng.integers(0, 256, (rows, IN // f.block, f.block_bytes)).astype(np.uint8)
    halves = (slice(0, 2), slice(2, 4)) if name == "Q4_K" else (slice(208, 210),)
    for at in halves:
        blocks[..., at] = rng.uniform(1e-4, 1e-3, blocks.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def made(name, **where):
    return jax.jit(ggml.from_file_blocks, static_argnums=(1, 2))(raw(name, **where), name, "float32")


@pytest.mark.parametrize("name", ggml.FORMATS)
def test_values_are_those_of_the_gguf_package(name):
    w = made(name)
    expected = gguf.quants.dequantize(raw(name), gguf.GGMLQuantizationType[name])
    assert w.shape == (IN, OUT)
    assert_close(values(w), expected.T)
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(w)) / expected.size
    theirs = 8 * ggml.FORMATS[name].block_bytes / ggml.FORMATS[name].block
    assert theirs <= bits <= theirs + 0.125  # Q4_K's scales of 6 bits are kept in 8


@pytest.mark.parametrize("tile", [base.TILE_ELEMENTS, 3000])
@pytest.mark.parametrize("name", ggml.FORMATS)
def test_the_product_is_one_with_the_values(name, tile, monkeypatch):
    monkeypatch.setattr(base, "TILE_ELEMENTS", tile)
    w, x = made(name), jax.random.normal(jax.random.key(0), (3, IN))
    f = lambda multiply: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(multiply(x)))))(x)  # noqa: E731
    fast, plain = f(lambda x: dot(x, w)), f(lambda x: x @ materialize(w))
    assert_close(fast, plain)


@pytest.mark.parametrize("name", ggml.FORMATS)
def test_slicing_a_stack_commutes(name):
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *(made(name, seed=i) for i in range(L)))
    assert stack.shape == (L, IN, OUT)
    for i in range(L):
        layer = jax.tree.map(lambda x, i=i: x[i], stack)
        assert_close(np.asarray(values(stack))[i], values(layer))
