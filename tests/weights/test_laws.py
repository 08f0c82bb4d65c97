"""The laws of a weight, for every form in the table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree, weight
from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.core.weight import declared_mask
from tests.support.close import assert_close
from tests.support.float64 import in_float64
from tests.support.thinning import leave
from tests.support.weight_forms import FORMS, IN, OUT, ROUNDED, ROUNDINGS, VARIANTS, L, kernel, shaken

# One program each for a form, where its operations one by one are ten.
materialize, dot, affine, grouped, merge = map(
    jax.jit, (weight.materialize, weight.dot, weight.affine, weight.grouped, weight.merge)
)
KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(2), (2, 5, IN))
BIAS = jnp.linspace(-1, 1, OUT)
each_form = pytest.mark.parametrize("name", leave(FORMS, VARIANTS))


@functools.cache
def made(name, stacked=False, trained=True):
    w = FORMS[name](KEY, kernel(stacked))  # not in a program, which would hold a random generator of its own
    return shaken(w, jax.random.key(3)) if trained else w


@each_form
@pytest.mark.parametrize("stacked", [False, True])
def test_shape_is_the_kernels(name, stacked):
    w = made(name, stacked)
    assert w.shape == materialize(w).shape == kernel(stacked).shape
    assert w.dtype == materialize(w).dtype == kernel(stacked).dtype


@each_form
def test_dot_is_multiplication_by_the_materialized_kernel(name):
    w = made(name)
    assert_close(dot(X, w), X @ materialize(w))


@pytest.mark.parametrize("name", ["array", "lora", "dora"])
def test_an_embedding_is_taken_from_and_multiplied_by_as_its_materialized_table(name):
    w, ids = made(name), jnp.array([[3, 0, 3], [1, 2, IN - 1]])
    table = materialize(w)
    assert_close(weight.take(w, ids), table[ids])
    x = jax.random.normal(jax.random.key(4), (2, 5, OUT))
    assert_close(weight.dot_to_float32(x, w, 1), x @ table.T)


@each_form
def test_affine_is_the_merged_kernel_and_bias(name):
    w, bias = made(name), jnp.linspace(-1, 1, OUT)
    merged = merge({"kernel": w, "bias": bias})
    assert_close(affine(X, w, bias), X @ merged["kernel"] + merged["bias"][None, None])


@each_form
@pytest.mark.parametrize("stacked", [False, True])
def test_identity_at_attach(name, stacked):
    if name == "lora zero A":
        assert not np.any(made(name, stacked, trained=False).a)
    start, plain = materialize(made(name, stacked, trained=False)), kernel(stacked)
    if name in ROUNDED:
        assert jnp.linalg.norm(start - plain) < ROUNDED[name] * jnp.linalg.norm(plain)
    else:
        assert_close(start, plain)


@each_form
def test_slicing_a_stack_commutes_with_materializing(name):
    stack = made(name, stacked=True)
    for i in range(L):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        assert_close(materialize(layer), materialize(stack)[i])


@each_form
def test_dot_under_scan_is_dot_layer_by_layer(name):
    stack = made(name, stacked=True)
    scanned = jax.lax.scan(lambda _, w: (None, dot(X, w)), None, stack)[1]
    assert_close(scanned, jnp.einsum("bti,lio->lbto", X, materialize(stack)))


@each_form
def test_grouped_is_each_rows_product_with_the_kernel_of_its_group(name):
    w, sizes = made(name, stacked=True), jnp.array([3, 0, 5], jnp.int32)
    x = jax.random.normal(jax.random.key(4), (8, IN))
    rows = jnp.concatenate([x[:3] @ materialize(w)[0], x[3:] @ materialize(w)[2]])
    assert_close(grouped(x, w, sizes), rows)


@each_form
def test_gradient_of_dot_is_the_gradient_through_materialize(name):
    w = made(name)
    trained, frozen = tree.split(w, declared_mask({"kernel": w}, ["kernel"] if name == "array" else [])["kernel"])

    def gradients(multiply):
        loss = lambda t, x: jnp.sum(jnp.sin(multiply(x, tree.join(t, frozen))))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, X)

    fast, plain = gradients(dot), gradients(lambda x, w: x @ materialize(w))
    assert len(jax.tree.leaves(fast)) == 1 + len(jax.tree.leaves(trained))
    assert jax.tree.leaves(trained) or name in ROUNDED  # a quantized base on its own has nothing to train
    assert_close(fast, plain, relative=2e-5)


def rms(values):
    return np.sqrt(np.mean(np.square(np.asarray(values, np.float64))))


def assert_rounded(actual, exact, times):
    """Holds bfloat16 values to the error of rounding the exact ones once, and `times` times more."""
    assert actual.dtype == jnp.bfloat16
    once = rms(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert rms(np.asarray(actual, np.float64) - exact) <= 1.2 * np.sqrt(1 + times) * once


@each_form
def test_a_bfloat16_product_is_rounded_as_often_as_the_form_says(name):
    w = shaken(FORMS[name](KEY, kernel(False).astype(jnp.bfloat16)), jax.random.key(3), 0.1)
    x = jax.random.normal(jax.random.key(5), (100, IN), jnp.bfloat16)
    assert materialize(w).dtype == jnp.bfloat16
    assert_rounded(dot(x, w), in_float64(lambda x, w: x @ weight.materialize(w), x, w), ROUNDINGS.get(name, 0))


@each_form
def test_the_backward_pass_of_a_bfloat16_product_keeps_no_float32_activation(name):
    rows = 97  # a number that no dimension of a form has
    w = shaken(FORMS[name](KEY, kernel(False).astype(jnp.bfloat16)), jax.random.key(3))
    trained, frozen = tree.split(w, declared_mask({"kernel": w}, [])["kernel"])
    pullback = lambda t, x: jax.vjp(lambda t, x: weight.affine(x, tree.join(t, frozen), BIAS), t, x)[1]  # noqa: E731
    program = jax.make_jaxpr(pullback)(trained, jnp.ones((rows, IN), jnp.bfloat16)).jaxpr
    kept = [v.aval for v in program.outvars if v.aval.shape[:1] == (rows,) and v.aval.size > rows]
    assert not [x for x in kept if x.dtype == jnp.float32]


GAINS = ("dora", "edora", "ia3 out", "ia3 in", "lora", "ia3 of dora")


@pytest.mark.parametrize("name", leave(GAINS, ("lora", "ia3 of dora")))
def test_a_grouped_bfloat16_product_is_rounded_as_often(name):
    w = shaken(FORMS[name](KEY, kernel(True).astype(jnp.bfloat16)), jax.random.key(3), 0.1)
    x, sizes = jax.random.normal(jax.random.key(5), (100, IN), jnp.bfloat16), jnp.array([30, 0, 70], jnp.int32)
    experts = np.repeat(np.arange(L), sizes)
    kernels = in_float64(weight.materialize, w)
    assert_rounded(
        grouped(x, w, sizes), np.einsum("ni,nio->no", np.float64(x), kernels[experts]), ROUNDINGS.get(name, 0)
    )


FACTORS = {"dora": "magnitude", "ia3 out": "s", "ia3 in": "s", "boft": "s"}


@pytest.mark.parametrize("name", FACTORS)
def test_a_small_gain_moves_bfloat16_outputs_by_as_much(name):
    w = FORMS[name](KEY, kernel(False).astype(jnp.bfloat16))
    x = jax.random.normal(jax.random.key(5), (1000, IN), jnp.bfloat16)
    exact = np.float64(x) @ np.float64(kernel(False).astype(jnp.bfloat16))
    raised = dataclasses.replace(w, **{FACTORS[name]: 1.002 * getattr(w, FACTORS[name])})
    assert abs(np.sum(np.float64(dot(x, raised)) * exact) / np.sum(exact * exact) - 1.002) < 5e-4


def test_the_scale_of_a_lora_moves_bfloat16_outputs_by_as_much():
    w = shaken(FORMS["lora"](KEY, jnp.zeros((IN, OUT), jnp.bfloat16)), jax.random.key(3))
    w = dataclasses.replace(w, a=jax.lax.reduce_precision(w.a, 8, 7), b=jax.lax.reduce_precision(w.b, 8, 7))
    x = jax.random.normal(jax.random.key(5), (1000, IN), jnp.bfloat16)
    exact = np.float64(x) @ np.float64(w.a) @ np.float64(w.b) * np.float64(w.scale)
    raised = dataclasses.replace(w, scale=1.002 * w.scale)
    assert abs(np.sum(np.float64(dot(x, raised)) * exact) / np.sum(exact * exact) - 1.002) < 5e-4


@pytest.mark.parametrize("name", FACTORS)
def test_the_gradient_of_a_gain_is_summed_in_float32(name):
    w, x = FORMS[name](KEY, jnp.ones((IN, OUT), jnp.bfloat16)), jnp.ones((5000, IN), jnp.bfloat16)

    def total(gain, x, w):  # all are arguments, since XLA on CPUs folds products of constant ones to 1
        return jnp.sum(weight.dot(x, dataclasses.replace(w, **{FACTORS[name]: gain})).astype(jnp.float32))

    gain = getattr(w, FACTORS[name])
    assert_close(jax.jit(jax.grad(total))(gain, x, w), 5000 * IN * OUT / gain.size / gain)


def test_a_bias_of_a_bfloat16_layer_has_a_float32_gradient():
    x, w = jnp.ones((5000, IN), jnp.bfloat16), kernel(False).astype(jnp.bfloat16)
    for form in (w, FORMS["lora"](KEY, w), FORMS["ia3 in"](KEY, w)):
        total = jax.jit(jax.grad(lambda bias, form=form: jnp.sum(affine(x, form, bias).astype(jnp.float32))))
        np.testing.assert_array_equal(total(jnp.zeros(OUT)), np.full(OUT, 5000, np.float32))


@each_form
def test_frozen_and_trained_leaves_split_and_join(name):
    w = made(name, stacked=True)
    mask = declared_mask({"kernel": w}, [])["kernel"]
    trained, frozen = tree.split(w, mask)
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(w))
    assert all(not n.endswith("base") for n in tree.leaf_names(trained))
    jax.tree.map(np.testing.assert_array_equal, tree.join(trained, frozen), w)
    arrays = flatten_named(w)  # as a checkpoint holds it, which has no uint4 and nothing empty
    assert all(x.size and x.dtype.name != "uint4" for x in arrays.values())
    jax.tree.map(np.testing.assert_array_equal, unflatten_named(w, arrays), w)
