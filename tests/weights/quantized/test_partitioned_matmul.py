"""Codes on a mesh: the same numbers, and no collective that a plain kernel would not need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.core import sharding
from lowrank.core.weight import dot
from lowrank.weights.quantized import base, ggml
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close

IN, OUT, ROWS = 256, 512, 16
BOTH, TENSOR = {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 1, "tensor": 2}
FORMS = {
    "nf4": lambda w: SCHEMES["nf4"](block=16, double=True)(w),
    "int4": lambda w: SCHEMES["int4"](block=32, symmetric=False)(w),
    "ternary": lambda w: SCHEMES["ternary"]()(w),  # whose runs of rows no mesh divides
    "llm_int8": lambda w: SCHEMES["llm_int8"](outliers=3)(w),
    "fp8": lambda w: SCHEMES["fp8"]()(w),
    "Q4_K": lambda w: ggml.from_file_blocks(
        (jnp.arange(OUT * 144, dtype=jnp.uint8) & jnp.uint8(63)).reshape(OUT, 144), "Q4_K", "float32"
    ),
}


def placed(w, leaf, mesh):
    tree = {"layers": {"mlp": {leaf: {"kernel": w}}}}
    shardings = sharding.parameter_shardings(tree, mesh)
    return jax.device_put(w, shardings["layers"]["mlp"][leaf]["kernel"])


def arguments(w, leaf, mesh):
    """`(x, g, w)` on a mesh, as a decoder has them: the inner width is divided by `tensor`."""
    inner, outer = (None, "tensor") if leaf == "up" else ("tensor", None)
    draw = jax.random.split(jax.random.key(2))
    put = lambda key, n, axis: jax.device_put(  # noqa: E731
        jax.random.normal(key, (ROWS, n)), NamedSharding(mesh, PartitionSpec(("data", "fsdp"), axis))
    )
    return put(draw[0], IN, inner), put(draw[1], OUT, outer), placed(w, leaf, mesh)


def forward_and_back(x, g, w):
    y, back = jax.vjp(lambda x: dot(x, w), x)
    return y, back(g)[0]


def kernel():
    return jax.random.normal(jax.random.key(1), (IN, OUT))


def collectives(w, leaf, mesh):
    """`{(operation, dtype, elements)}` of the product and its gradient, compiled."""
    x, g, w = arguments(w, leaf, mesh)
    text = jax.jit(forward_and_back, out_shardings=(g.sharding, x.sharding)).lower(x, g, w).compile().as_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* (all-\w+|reduce-scatter|collective-permute)\(", text)
    return {(op, kind, int(np.prod([int(n) for n in shape.split(",")]))) for kind, shape, op in found}


@pytest.mark.parametrize(("sizes", "leaf"), [(BOTH, "up"), (BOTH, "down"), (TENSOR, "down")])
def test_codes_are_gathered_where_a_kernel_would_be_and_nothing_decoded_is(sizes, leaf, monkeypatch):
    monkeypatch.setattr(base, "TILE_ELEMENTS", 16384)
    mesh, w = sharding.make_mesh(**sizes), kernel()
    plain = collectives(w, leaf, mesh)
    codes = collectives(jax.jit(FORMS["nf4"])(w), leaf, mesh)
    gathered = {found for found in codes if found[0] == "all-gather"}
    assert codes - gathered == {found for found in plain if found[0] != "all-gather"}
    assert bool(gathered) == any(found[0] == "all-gather" for found in plain) == (sizes is BOTH)
    for _, kind, elements in gathered:
        assert elements <= IN * OUT // (2 if kind == "u8" else 16)  # codes, and magnitudes


@pytest.mark.parametrize(("form", "leaf"), list(zip(FORMS, ("up", "down") * 4, strict=False)))
def test_a_divided_product_is_the_product(form, leaf, monkeypatch):
    monkeypatch.setattr(base, "TILE_ELEMENTS", 16384)
    w = jax.jit(FORMS[form])(kernel())
    x, g, on_mesh = arguments(w, leaf, sharding.make_mesh(**BOTH))
    y, dx = jax.jit(forward_and_back)(x, g, on_mesh)
    values = np.asarray(jax.jit(lambda w: w.materialize())(w))
    assert_close(y, np.asarray(x) @ values)
    assert_close(dx, np.asarray(g) @ values.T, relative=1e-5)
