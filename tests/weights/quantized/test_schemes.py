"""Codes and decoded values against NumPy in float64, edge cases of blocks, and the memory of the compiled product."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.core.weight import dot, materialize
from lowrank.weights.quantized import base, double_quantization, lookup_tables, uniform
from lowrank.weights.quantized.packing import pack, unpack
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support import large_product
from tests.support.close import assert_close

IN, OUT = 40, 24
W = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
values = jax.jit(materialize)


@functools.cache
def maker(scheme, **options):
    return jax.jit(SCHEMES[scheme](**options))


def made(scheme, w=W, **options):
    return maker(scheme, **options)(w)


def by_group(fn, block, w=W):
    """`fn` of every group of `block` rows of every column, in float64; the last group may be shorter."""
    w = np.asarray(w, np.float64)
    parts = [fn(w[i : i + block, j]) for j in range(w.shape[1]) for i in range(0, w.shape[0], block)]
    return np.concatenate(parts).reshape(w.shape[1], w.shape[0]).T


def to_table(table):
    def nearest(v):
        return np.abs(v).max() * table[np.abs(v[:, None] / np.abs(v).max() - table).argmin(1)]

    return nearest


def about_zero(bits):
    def rounded(v):
        s = np.abs(v).max() / (2 ** (bits - 1) - 1)
        return np.round(v / s) * s

    return rounded


def between(v):
    s = (max(v.max(), 0) - min(v.min(), 0)) / 15
    zero = np.round(-min(v.min(), 0) / s)
    return (np.clip(np.round(v / s) + zero, 0, 15) - zero) * s


FP4 = [sign * m for m in (0, 0.0625, 2, 3, 4, 6, 8, 12) for sign in (1 / 12, -1 / 12)]


@pytest.mark.parametrize(
    ("scheme", "options", "block", "formula"),
    [
        ("nf4", {}, 64, to_table(np.float64(lookup_tables.TABLES["nf4"]))),
        ("nf4", {"block": 16}, 16, to_table(np.float64(lookup_tables.TABLES["nf4"]))),
        ("fp4", {"block": 8}, 8, to_table(np.float64(FP4))),
        ("int8", {}, IN, about_zero(8)),
        ("int4", {"block": 12}, 12, about_zero(4)),
        ("int4", {"block": 0}, IN, about_zero(4)),
        ("integer", {"bits": 2, "block": 8}, 8, about_zero(2)),
        ("integer", {"bits": 8, "block": 16}, 16, about_zero(8)),
        ("int4", {"block": 16, "symmetric": False}, 16, between),
    ],
)
def test_values_are_those_of_the_formula(scheme, options, block, formula):
    assert_close(values(made(scheme, **options)), by_group(formula, block))


@pytest.mark.parametrize(("name", "kind"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_8_bit_floats_are_those_of_ml_dtypes(name, kind):
    scale = np.abs(W).max(0) / np.float32(ml_dtypes.finfo(kind).max)
    expected = np.clip(W / scale, -float(ml_dtypes.finfo(kind).max), float(ml_dtypes.finfo(kind).max)).astype(kind)
    w = made("fp8", format=name)
    assert np.mean(np.asarray(w.codes) != expected) < 0.01  # but for ties
    assert_close(values(w), np.float32(expected) * scale, relative=0.26, per_element=True)


def test_ternary_is_the_mean_magnitude_times_a_sign_or_zero():
    mean = np.abs(np.float64(W)).mean()
    assert_close(values(made("ternary")), np.clip(np.round(W / mean), -1, 1) * mean)


def test_outlying_inputs_stay_in_bfloat16_and_narrow_the_rest():
    w = W.copy()
    w[[3, 17]] *= 20
    split = made("llm_int8", w, outliers=2)
    assert sorted(np.asarray(split.index).tolist()) == [3, 17]
    kernel = np.asarray(values(split))
    np.testing.assert_array_equal(kernel[[3, 17]], np.float32(w[[3, 17]].astype(ml_dtypes.bfloat16)))
    rest = np.delete(np.arange(IN), [3, 17])
    plain = np.asarray(values(made("int8", w)))
    assert np.abs(kernel - w)[rest].mean() < 0.1 * np.abs(plain - w)[rest].mean()


def test_double_quantization_costs_little_and_saves_what_it_says():
    w = np.random.default_rng(1).standard_normal((512, 96)).astype(np.float32)
    single, double = made("nf4", w), made("nf4", w, double=True)
    gap = np.abs(np.asarray(values(double)) - np.asarray(values(single))).max()
    assert 0 < gap < 0.03 * np.abs(w).max()
    bits = [8 * sum(x.nbytes for x in jax.tree.leaves(q)) / w.size for q in (single, double)]
    assert_close(bits, [4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)], relative=1e-3)


def test_the_8_bit_table_can_be_computed():
    codes = np.arange(256, dtype=np.uint8)
    assert_close(jax.jit(double_quantization.compute_dynamic_values)(codes), double_quantization.dynamic_table())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_and_found_again(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 2, 16, 5)).astype(np.uint8)
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.shape == (3, 2 * 16 * bits // 8, 5)
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=(1, 2))(packed, bits, 16), codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_constants(scheme):
    w = np.zeros((IN, OUT), np.float32)
    np.testing.assert_array_equal(values(made(scheme, w)), w)
    w[:] = -0.37
    assert_close(values(made(scheme, w)), w, relative=0.01)
    w[:, ::2] = 0
    if scheme != "ternary":  # whose one scale is for all of the kernel
        options = {"double": False} if scheme == "mixed" else {}  # whose two bits have no code for 0, only a scale
        assert_close(values(made(scheme, w, **options)), w, relative=0.01)


TILED = {
    "nf4": {"block": 8, "double": True},
    "int4": {"block": 4, "symmetric": False},
    "int8": {},
    "fp8": {},
    "ternary": {},
    "integer": {"block": 0},
    "llm_int8": {"outliers": 3},
    "mixed": {"block": 20, "budget": 4.0},
}


@pytest.mark.parametrize("scheme", TILED)
def test_the_product_by_tiles_is_the_product(scheme, monkeypatch):
    monkeypatch.setattr(base, "TILE_ELEMENTS", 200)  # tiles that divide neither axis
    monkeypatch.setattr(base, "LANES", 1)
    w = made(scheme, W[:38], **TILED[scheme])
    x = jax.random.normal(jax.random.key(1), (2, 3, 38))

    def value_and_gradient(multiply):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(multiply(x)))))(x)

    assert_close(
        value_and_gradient(lambda x: dot(x, w)), value_and_gradient(lambda x: x @ materialize(w)), relative=2e-5
    )


@pytest.mark.parametrize(("scheme", "options"), [("nf4", {"double": True}), ("ternary", {}), ("fp8", {})])
def test_a_large_product_and_its_gradient_make_no_copy_of_the_kernel(scheme, options):
    """A 4096 x 14336 kernel is 235 MB in float32; a program's temporaries stay below 32 MB in all."""
    compiled = large_product.programs(jax.devices()[0], scheme, rows=64, **options)
    assert max(large_product.temporaries(compiled)) < 32e6


def test_what_is_saved_for_the_gradient_is_the_codes_alone():
    w = made("nf4")
    saved = jax.tree.leaves(jax.jit(lambda x, w: jax.vjp(lambda x: dot(x, w), x)[1])(np.ones((2, IN), np.float32), w))
    assert sum(x.nbytes for x in saved) <= sum(x.nbytes for x in jax.tree.leaves(w))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SCHEMES["nf4"](block=6), "block must be a multiple of 4, at least 4, not 6"),
        (lambda: SCHEMES["integer"](bits=3), "bits must be one of 2, 4, 8, not 3"),
        (lambda: SCHEMES["fp8"](format="e3m4"), "unknown quantize.format 'e3m4'"),
        (lambda: SCHEMES["llm_int8"](outliers=0), "outliers must be at least 1"),
        (lambda: made("llm_int8", outliers=IN + 1), "a kernel with 40 inputs cannot have 41 outliers"),
        (lambda: uniform.quantize_symmetric(jnp.ones((8, 8)), bits=3), "cannot have 3 bits: use 2, 4, 8"),
    ],
)
def test_bad_options_are_refused_by_name(call, message):
    with pytest.raises(UserError, match=message):
        call()
