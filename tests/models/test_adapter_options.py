"""Bottleneck adapters in decoders and encoders, against the papers' formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.models import DecoderConfig
from tests.support.close import assert_close
from tests.support.tiny_models import LLAMA, SIZES, decoder, encoder, run, tokens

ACT = {"relu": lambda x: np.maximum(x, 0), "silu": lambda x: x / (1 + np.exp(-x))}
KINDS = {
    "houlsby": {"name": "houlsby", "width": 5, "activation": "relu"},
    "pfeiffer": {"name": "pfeiffer", "width": 3, "scale": 2.0},
    "parallel": {"name": "parallel", "width": 4, "after": "both"},
    "scaled": {"name": "scaled_parallel", "width": 4, "after": "attn", "activation": "silu"},
}


def options(kind):
    return dict(methods.build_method(KINDS[kind]).model_options)


def norm(x, p):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(p["scale"])


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


READS = {"houlsby": "output", "pfeiffer": "sum", "parallel": "input", "scaled": "input"}


def adapter_output(p, sublayer, read, kind):
    """The output of the sublayer's adapter, 0 without one, from the one of `read` that the paper names."""
    o, name = options(kind), f"{sublayer}_adapter"
    if name not in p:
        return 0
    hidden = ACT[o["adapter_activation"]](linear(read[READS[kind]], p[name]["down"]))
    return o["adapter_scale"] * linear(hidden, p[name]["up"])


def expected(h, params, layer, kind):
    """One Llama layer on `h [T, D]` without rope, read off the papers: attention of one token is its value."""
    p = jax.tree.map(lambda x: np.asarray(x[layer], np.float64), params["layers"])

    def adapt(name, h, x, y):
        return h + y + adapter_output(p, name, {"input": x, "output": y, "sum": h + y}, kind)

    x = norm(h, p["attn_norm"])
    value = (x @ p["attn"]["v"]["kernel"]).reshape(-1, 2, 1, 6).repeat(2, 2).reshape(len(h), -1)
    h = adapt("attn", h, x, value @ p["attn"]["o"]["kernel"])
    x = norm(h, p["mlp_norm"])
    gate, up = (x @ p["mlp"][n]["kernel"] for n in ("gate", "up"))
    return adapt("mlp", h, x, (ACT["silu"](gate) * up) @ p["mlp"]["down"]["kernel"])


def expected_post_norm(h, params, kind):
    """The first layer of BERT on `h [T, D]`, read off AdapterHub's source; attention of one token is its value."""
    p = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])

    def adapt(name, h, y):
        read = {"input": h, "output": y, "sum": layer_norm(h + y, p[f"{name}_norm"])}
        return layer_norm(h + y + adapter_output(p, name, read, kind), p[f"{name}_norm"])

    h = adapt("attn", h, linear(linear(h, p["attn"]["v"]), p["attn"]["o"]))
    hidden = linear(h, p["mlp"]["up"])
    gelu = hidden * np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))(hidden)
    return adapt("mlp", h, linear(gelu, p["mlp"]["down"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_has_the_adapters_of_the_paper(kind):
    model, params = decoder("llama", layers=1, **options(kind))
    ids = tokens(1, 1)
    h = np.asarray(params["embed"]["embedding"], np.float64)[ids[0]]
    want = norm(expected(h, params, 0, kind), params["norm"])
    assert_close(run(model, params, ids)[0], want)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_has_the_adapters_of_the_paper(kind):
    model, params = encoder(layers=1, **options(kind))
    ids = tokens(1, 1)
    rows = [np.asarray(params["embed"][name], np.float64)[0] for name in ("positions", "types")]
    h = np.asarray(params["embed"]["embedding"], np.float64)[ids[0]] + sum(rows)
    h = layer_norm(h, jax.tree.map(np.asarray, params["embed"]["norm"]))
    assert_close(run(model, params, ids)[0], expected_post_norm(h, params, kind))


@pytest.mark.parametrize("make", [lambda **o: decoder("gemma", **o), lambda **o: encoder(num_labels=3, **o)])
@pytest.mark.parametrize("kind", ["houlsby", "parallel", "pfeiffer"])
def test_adapters_whose_second_layer_is_zero_change_nothing_and_others_do(make, kind):
    model, params = make(**options(kind))
    plain, _ = make()
    zeroed = tree.map_named(lambda n, x: 0 * x if "adapter/up" in n else x, params)
    want = run(plain, params, tokens(2), method="__call__")
    assert_close(run(model, zeroed, tokens(2), method="__call__"), want)
    assert np.abs(run(model, params, tokens(2), method="__call__") - want).max() > 1e-2


def test_houlsby_trains_every_norm_of_an_encoder():
    _, params = encoder(**options("houlsby"))
    learns = dict(tree.named_leaves(methods.trainable_mask(methods.build_method(KINDS["houlsby"]), params)))
    norms = {name for name in learns if "norm/" in name}
    assert norms >= {"embed/norm/scale", "embed/norm/bias", "layers/mlp_norm/scale"}
    assert {name for name in learns if learns[name]} == norms | {name for name in learns if "adapter" in name}


def test_adapters_start_as_zero_and_have_a_place_on_every_mesh():
    model, _ = decoder("llama", **options("houlsby"))
    init = jax.jit(lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"])
    params = init()
    adapters = {n: x for n, x in tree.named_leaves(params) if "adapter" in n}
    assert sum(x.size for x in adapters.values()) == 2 * 2 * (2 * 16 * 5 + 5 + 16)
    assert all(np.any(x) == n.endswith("down/kernel") for n, x in adapters.items())
    sharding.parameter_shardings(params, sharding.make_mesh(1, 2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_width": -1}, "adapter_width=-1 is below 0"),
        ({"adapter_after": ("mpl",)}, "unknown sublayer in adapter_after 'mpl' .did you mean 'mlp'"),
        ({"adapter_width": 2, "adapter_after": ()}, "no layer has an adapter"),
        ({"adapter_parallel": True, "adapter_on_sum": True}, "name two inputs of one adapter"),
        ({"adapter_activation": "relo"}, "did you mean 'relu'"),
        ({"top_layers": -3}, "top_layers=-3 is not in -2..2: the model has 2 layers"),
    ],
)
def test_additions_that_no_model_can_have_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**{**SIZES, **LLAMA, **changes})
