"""The mixture of experts against float64 NumPy, token by token, and under a mesh."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.models import DecoderConfig, build_model
from lowrank.models.moe import MoE, route_tokens, sort_by_expert
from tests.support.close import assert_close
from tests.support.tiny_models import MOE, SIZES, _random, normal, run, tokens

B, T, D, E, F, K = 2, 3, 6, 5, 4, 2


def drawn(layer, x, size):
    """Kernels as large as `size`, in the shapes that the layer starts with."""
    like, seed = jax.eval_shape(layer.init, jax.random.key(0), x)["params"], itertools.count(1)
    return jax.tree.map(lambda p: size * normal(next(seed), *p.shape), like)


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(x, p, e=...):
    gate, up, down = (np.asarray(p[n]["kernel"], np.float64)[e] for n in ("gate", "up", "down"))
    return (silu(x @ gate) * (x @ up)) @ down


def token_by_token(x, p, normalize):
    """Each token's experts one after another, as the papers have them."""
    y = np.zeros_like(x)
    for n, token in enumerate(x):
        logits = token @ np.asarray(p["router"]["kernel"], np.float64)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        chosen = np.argsort(-probs)[:K]
        total = probs[chosen].sum() if normalize else 1.0
        y[n] = sum(probs[e] / total * mlp(token, p["experts"], e) for e in chosen)
        if "shared" in p:
            y[n] += mlp(token, p["shared"]) / (1 + np.exp(-token @ np.asarray(p["shared_gate"]["kernel"], np.float64)))
    return y


@pytest.mark.parametrize(("normalize", "shared"), [(False, 0), (True, 0), (False, 7)])
def test_the_layer_is_the_weighted_sum_of_each_tokens_experts(normalize, shared):
    layer, x = MoE(E, K, F, "silu", normalize, shared), normal(0, B, T, D)
    params = drawn(layer, x, 0.4)
    y = np.asarray(jax.jit(layer.apply)({"params": params}, x))
    expected = token_by_token(np.asarray(x, np.float64).reshape(-1, D), params, normalize)
    assert_close(y.reshape(-1, D), expected)


def test_rows_are_sorted_by_expert_and_find_their_way_back():
    routing = jax.jit(lambda logits: route_tokens(logits, K, True))(normal(0, 7, E))
    rows = jax.tree.map(np.asarray, jax.jit(lambda routing: sort_by_expert(routing, E))(routing))
    assert_close(np.sum(np.asarray(routing.gates), axis=-1), 1)
    ids = np.asarray(routing.experts).reshape(-1)
    assert np.asarray(rows.sizes).tolist() == np.bincount(ids, minlength=E).tolist()
    np.testing.assert_array_equal(rows.tokens[rows.back], np.arange(7).repeat(K))
    assert_close(rows.gates[rows.back], np.asarray(routing.gates).reshape(-1))


def test_a_sharded_decoder_with_experts_computes_what_one_device_does():
    config = DecoderConfig(**{**SIZES, **MOE, "expert_hidden": 12})
    model, params = _random(build_model(config))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = sharding.parameter_shardings(params, mesh)
    specs = {name: s.spec for name, s in tree.named_leaves(where)}
    assert specs["layers/mlp/experts/up/kernel"] == jax.sharding.PartitionSpec(None, None, "fsdp", "tensor")
    assert specs["layers/mlp/experts/down/kernel"] == jax.sharding.PartitionSpec(None, None, "tensor", "fsdp")
    params, ids = jax.tree.map(np.asarray, params), tokens(4)  # NumPy: a shard of it is cut by no program
    whole = run(model, params, ids)
    parts = run(model, jax.device_put(params, where), jax.device_put(ids, sharding.batch_sharding(mesh, 2, True)))
    assert_close(parts, whole)


def test_gradients_reach_the_router_and_the_chosen_experts():
    layer, x = MoE(E, K, F, "silu"), normal(0, 1, 1, D)
    loss = lambda p, x: jnp.sum(jnp.sin(50 * layer.apply({"params": p}, x)))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(drawn(layer, x, 0.02), x)
    assert np.any(np.asarray(grads["router"]["kernel"]))
    touched = np.any(np.asarray(grads["experts"]["up"]["kernel"]) != 0, axis=(1, 2))
    assert touched.sum() == K


def test_more_experts_a_token_than_there_are_is_refused():
    config = DecoderConfig(**{**SIZES, **MOE})
    with pytest.raises(UserError, match=r"experts_per_token=5 is not in 1\.\.4"):
        dataclasses.replace(config, experts_per_token=5)
