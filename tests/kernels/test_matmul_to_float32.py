"""Products whose result is float32: logits, of a head or of an embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.weight import dot_to_float32
from tests.support.close import assert_close
from tests.support.weight_forms import FORMS, shaken


def inputs(axis):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 16)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((16, 33) if axis == 0 else (33, 16)), jnp.float32)
    return x, w, (w if axis == 0 else w.T)


@pytest.mark.parametrize("axis", [0, 1])
def test_logits_of_half_precision_features_are_not_rounded(axis):
    x, w, kernel = inputs(axis)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    logits = dot_to_float32(x, w, axis)
    assert logits.dtype == jnp.float32
    assert_close(logits, exact)


@pytest.mark.parametrize("axis", [0, 1])
def test_half_precision_gradients_are_those_of_single_precision_rounded(axis):
    x, w, _ = inputs(axis)
    target = np.random.default_rng(1).standard_normal((2, 5, 33)).astype(np.float32)
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(dot_to_float32(x, w, axis)) * target), argnums=(0, 1))
    half, single = gradient(x, w), gradient(x.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32))
    for ours, exact in zip(half, single, strict=True):
        assert_close(np.asarray(ours, np.float32), exact, relative=0.02)
    assert [g.dtype for g in half] == [x.dtype, w.dtype]


@pytest.mark.parametrize("name", ["lora", "dora", "nf4", "int8", "ia3 in"])
def test_logits_of_a_head_that_is_a_form_are_not_rounded(name):
    x, w, _ = inputs(0)
    form = FORMS[name](jax.random.key(0), w.astype(jnp.bfloat16))
    logits = jax.jit(dot_to_float32)(x, form)
    assert logits.dtype == jnp.float32
    assert_close(logits, np.asarray(x, np.float64) @ np.asarray(form.materialize(), np.float64), relative=2e-5)


def test_a_head_may_be_a_form():
    x, w, _ = inputs(0)
    form = shaken(FORMS["lora"](jax.random.key(0), w), jax.random.key(1))
    ours, plain = dot_to_float32(x.astype(jnp.float32), form, 0), dot_to_float32(x.astype(jnp.float32), w, 0)
    assert_close(ours, dot_to_float32(x.astype(jnp.float32), form.materialize(), 0))
    assert np.abs(ours - plain).max() > 1
