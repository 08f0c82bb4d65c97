"""2 and 4 bits in one kernel against NumPy in float64, and the budget they keep to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import pretrained
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import dot, is_stored, is_weight, materialize
from lowrank.weights.quantized import lookup_tables, mixed
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close

IN, OUT, BLOCK = 44, 12, 8
W = np.random.default_rng(0).standard_normal((2, IN, OUT)).astype(np.float32)
W[:, :BLOCK] *= 5  # the group that two bits hurt most
values, gains = jax.jit(materialize), jax.jit(mixed.error_reductions, static_argnums=1)
N2 = np.array([-1.510, -0.4528, 0.4528, 1.510]) / 1.510


def four(v):
    top = np.abs(v).max()
    table = np.float64(lookup_tables.TABLES["nf4"])
    return top * table[np.abs(v[:, None] / top - table).argmin(1)]


def two(v):
    tried = [share * np.abs(v).max() * N2 for share in np.linspace(0.4, 1, 31)]
    found = [levels[np.abs(v[:, None] - levels).argmin(1)] for levels in tried]
    return min(found, key=lambda x: np.sum((x - v) ** 2))


def by_group(fn, w):
    """`fn` of every group of every column in float64: `[n]` parts `[block, out]`, the last one shorter."""
    parts = [np.float64(w[i : i + BLOCK]) for i in range(0, len(w), BLOCK)]
    return [np.stack([fn(column) for column in part.T], axis=1) for part in parts]


def expected(w, high):
    low, wide = by_group(two, w), by_group(four, w)
    parts = [w[i : i + BLOCK] for i in range(0, len(w), BLOCK)]
    gain = [np.sum((a - p) ** 2) - np.sum((b - p) ** 2) for a, b, p in zip(low, wide, parts, strict=True)]
    best = set(np.argsort(gain)[::-1][:high])
    return np.concatenate([wide[i] if i in best else low[i] for i in range(len(parts))]), np.array(gain)


@pytest.mark.parametrize("high", [0, 2, 6])
def test_values_are_those_of_the_formula(high):
    made = np.asarray(jax.jit(lambda w: mixed.quantize(w, high=high, block=BLOCK, double=False).materialize())(W))
    for i in range(2):
        kernel, gain = expected(W[i], high)
        assert_close(made[i], kernel)
        assert_close(gains(W[i], BLOCK), gain)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("high", [0, 3, 6])
def test_the_bits_that_are_counted_are_those_of_the_arrays(high, double):
    made = jax.eval_shape(lambda w: mixed.quantize(w, high=high, block=BLOCK, double=double), W)
    assert mixed.total_bits(W.shape, high, BLOCK, double) == 8 * sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(made)
    )


@pytest.mark.parametrize("budget", [3.1, 3.5, 4.0])
def test_a_budget_goes_to_the_kernels_that_gain_most_and_is_met(budget):
    shapes = {"even": (2, 128, 64), "wild": (2, 128, 64), "small": (64, 32)}
    rng = np.random.default_rng(1)
    gain = {name: rng.random((*shape[:-2], shape[-2] // 8)) for name, shape in shapes.items()}
    gain["wild"] += 10
    high = mixed.allocate_groups(gain, shapes, budget, 8, True)
    spent = lambda high: sum(mixed.total_bits(shapes[n], k, 8, True) for n, k in high.items())  # noqa: E731
    weights = sum(np.prod(shape) for shape in shapes.values())
    assert spent(high) <= budget * weights
    assert high["wild"] == 16 or not high["even"]
    for name, shape in shapes.items():  # nothing more fits
        more = {**high, name: high[name] + 1}
        assert high[name] == shape[-2] // 8 or spent(more) > budget * weights


def test_a_product_and_its_gradient_make_no_copy_of_the_kernel():
    quantize = lambda w: SCHEMES["mixed"](budget=3.5)(w)  # noqa: E731
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16))
    assert 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(w)) <= 3.5 * 4096 * 14336

    def forward_and_back(x, g, w):
        y, back = jax.vjp(lambda x: dot(x, w), x)
        return y, back(g)

    x, g = (jax.ShapeDtypeStruct((64, n), jnp.bfloat16) for n in (4096, 14336))
    memory = jax.jit(forward_and_back).lower(x, g, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32e6


@pytest.mark.parametrize("top", [1])
def test_a_model_is_read_within_its_budget(top, tmp_path):
    folder, group = tiny.llama(tmp_path / "llama"), {"name": "mixed", "budget": 4.0, "block": 4, "double": False}
    group["target"] = "(layers|top)/mlp/.*kernel"
    with pytest.raises(UserError, match=r"budget 4\.0 is too small: 2 bits with their scales take 10\."):
        pretrained.describe(str(folder), quantized=group)
    group |= {"block": 16, "double": True}
    options = {"top_layers": top}
    shapes = pretrained.describe(str(folder), options, quantized=group)[2]
    read = pretrained.load(str(folder), quantized=group, model=options)
    assert jax.tree.structure(shapes) == jax.tree.structure(read.params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, read.params))
    kernels = [w for _, w in tree.named_leaves(read.params, is_weight) if is_stored(w)]
    assert len(kernels) == 3 * (1 + top)
    assert sum(x.nbytes for x in jax.tree.leaves(kernels)) * 8 <= 4 * sum(np.prod(w.shape) for w in kernels)
    assert any(w.high is not None for w in kernels)
    plain = pretrained.load(str(folder), model=options).params
    whole, found = (np.asarray(values(p["layers"]["mlp"]["up"]["kernel"])) for p in (plain, read.params))
    assert np.linalg.norm(found - whole) < 0.4 * np.linalg.norm(whole)


@pytest.mark.parametrize("budget", [1.9, 4.5])
def test_a_budget_outside_2_to_4_is_refused(budget):
    with pytest.raises(UserError, match=f"budget must be from 2 to 4 bits per weight, not {budget}"):
        SCHEMES["mixed"](budget=budget)
