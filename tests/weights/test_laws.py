"""The laws of a weight, for every form in the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree, weight
from lowrank.core.tree import flatten_named, unflatten_named
from lowrank.core.weight import declared_mask
from tests.support.close import assert_close
from tests.support.thinning import leave
from tests.support.weight_forms import FORMS, IN, OUT, ROUNDED, VARIANTS, L, kernel, shaken

# One program each for a form, where its operations one by one are ten.
materialize, dot, affine, grouped, merge = map(
    jax.jit, (weight.materialize, weight.dot, weight.affine, weight.grouped, weight.merge)
)
KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(2), (2, 5, IN))
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


@each_form
def test_bfloat16_base_keeps_its_dtype_and_stays_close(name):
    w = FORMS[name](KEY, kernel(False).astype(jnp.bfloat16))
    assert materialize(w).dtype == jnp.bfloat16
    y = dot(X.astype(jnp.bfloat16), w)
    assert y.dtype == jnp.bfloat16
    near = materialize(w).astype(jnp.float32) if name in ROUNDED else kernel(False)
    assert_close(y.astype(jnp.float32), X @ near, relative=0.04)


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
