"""A form stands in the place of any kernel, stacked or not, under scan and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree, weight
from tests.support.close import assert_close
from tests.support.tiny_models import decoder, encoder, run, tokens
from tests.support.weight_forms import FORMS, shaken


def rewritten(params, make):
    """Every kernel replaced by a trained form on it."""

    def form(name, w):
        key = weight.name_key(jax.random.key(0), name)
        return shaken(make(key, w), key) if name.endswith("kernel") else w

    return tree.map_named(form, params)


def merged(params):
    return jax.jit(weight.merge)(params)


@pytest.mark.parametrize("form", ["lora ranks by layer", "ia3 of dora"])
def test_a_decoder_on_forms_equals_the_decoder_on_their_merged_kernels(form):
    model, params = decoder("gpt2", remat="full")
    params = rewritten(params, FORMS[form])
    live = run(model, params, tokens(1), method="__call__")
    want = run(model, merged(params), tokens(1), method="__call__")
    scale = float(jnp.abs(want).max())
    assert_close(live, want)
    plain = run(model, decoder("gpt2")[1], tokens(1), method="__call__")
    assert np.abs(live - plain).max() > 1e-2 * scale


def test_an_encoder_on_forms_equals_the_encoder_on_their_merged_kernels():
    model, params = encoder(pooling="pooler", dense_head=True, num_labels=3)
    params = rewritten(params, FORMS["lora of ia3"])
    live = run(model, params, tokens(2), method="__call__")
    assert_close(live, run(model, merged(params), tokens(2), method="__call__"))


def test_gradients_reach_the_trained_fields_of_every_layer():
    model, params = decoder("llama", remat="full")
    params = rewritten(params, FORMS["lora"])
    trained, frozen = tree.split(params, weight.declared_mask(params))
    loss = lambda t: jnp.mean(model.apply({"params": tree.join(t, frozen)}, tokens(1)) ** 2)  # noqa: E731
    grads = tree.named_leaves(jax.jit(jax.grad(loss))(trained))
    assert {name.rsplit("/", 1)[1] for name, _ in grads} == {"a", "b"}
    assert all(np.all(np.any(np.asarray(g) != 0, axis=(-1, -2))) for _, g in grads)
