"""LoRA on the kernels of experts: its formula on routed rows, its attachment, and what it never forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.weight import grouped, merge
from tests.support.close import assert_close, difference
from tests.support.tiny_models import decoder, run, tokens
from tests.support.weight_forms import lora_on, shaken

UP = r"layers/mlp/experts/up/kernel"


def test_routed_rows_meet_the_update_of_their_own_expert_in_float64():
    rng = np.random.default_rng(0)
    kernel, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 6, 5), (7, 6)))
    w, sizes = shaken(lora_on(jax.random.key(1), kernel, (2, 1, 2)), jax.random.key(2)), np.int32([2, 4, 1])
    base, a, b, scale = (np.asarray(t, np.float64) for t in (w.base, w.a, w.b, w.scale))
    expert = [0, 0, 1, 1, 1, 1, 2]
    rows = [np.asarray(x[i], np.float64) @ (base[e] + scale[e] * a[e] @ b[e]) for i, e in enumerate(expert)]
    assert_close(jax.jit(grouped)(x, w, sizes), np.stack(rows))


def attached(**group):
    _, params = decoder("moe")
    return methods.attach(methods.build_method({"name": "lora", "target": UP, **group}), params, jax.random.key(0))


def test_every_expert_of_a_layer_has_the_rank_and_scale_of_the_layer():
    w = attached(rank=3, alpha=6.0, rank_pattern={r"layers/1/.*": 2})["layers"]["mlp"]["experts"]["up"]["kernel"]
    assert w.a.shape == (2, 4, 16, 3)
    assert w.b.shape == (2, 4, 3, 10)
    assert_close(w.scale, [[2.0] * 4, [3.0] * 4])
    assert np.any(np.asarray(w.a) != 0, axis=2).sum(-1).tolist() == [[3] * 4, [2] * 4]


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_adapted_model_is_the_merged_model(name):
    model, params = decoder("moe")
    method = methods.build_method({"name": name, "rank": 2, "target": r"layers/mlp/(experts|shared)/.*kernel"})
    params = methods.attach(method, params, jax.random.key(0))
    names = {n for n, learns in tree.named_leaves(methods.trainable_mask(method, params)) if learns}
    params = tree.map_named(lambda n, x: np.asarray(x) + np.float32(0.1) if n in names else x, params)
    merged = jax.jit(merge)(params)
    assert_close(run(model, params, tokens(2)), run(model, merged, tokens(2)))


def test_dropout_has_a_key_for_each_layer():
    params = attached(rank=2, dropout=0.5, init="zero_a")
    method = methods.build_method({"name": "lora", "rank": 2, "target": UP, "dropout": 0.5})
    w = method.bind(params, None, jax.random.key(5))["layers"]["mlp"]["experts"]["up"]["kernel"]
    x, sizes = np.ones((8, 16), np.float32), np.int32([8, 0, 0, 0])

    @jax.jit
    def low(w):
        layer = jax.tree.map(lambda leaf: leaf[0], w)
        moved = layer.__class__(**{**vars(layer), "a": layer.a + 1.0})
        return grouped(x, moved, sizes) - grouped(x, layer.base, sizes)

    found = np.asarray(low(w))
    assert difference(found[:1], found) > 1e-3


@pytest.mark.parametrize("name", ["dora", "edora", "bidora"])
def test_dropout_acts_on_the_input_of_the_update_of_experts_in_float64(name):
    group = {"name": name, "rank": 2, "target": UP, "dropout": 0.5}
    bound = methods.build_method(group).bind(attached(**group), None, jax.random.key(5))
    w = jax.tree.map(lambda leaf: leaf[0], bound["layers"]["mlp"]["experts"]["up"]["kernel"])
    w = shaken(w, jax.random.key(6))
    x, sizes = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32), np.int32([8, 0, 0, 0])
    kept = np.asarray(jax.random.bernoulli(w.key[0], 0.5, x.shape))
    a, b = (np.asarray(t[0], np.float64) for t in w.factors())
    base, scale, magnitude = (np.asarray(t[0], np.float64) for t in (w.base, w.scale, w.magnitude))
    gain = magnitude / np.linalg.norm(base + scale * a @ b, axis=0)
    assert_close(jax.jit(grouped)(x, w, sizes), (x @ base + scale * (2 * kept * x) @ a @ b) * gain)


def test_no_experts_update_is_formed():
    E, width, rows = 16, 256, 8  # the updates of all experts are 4 MiB, the routed rows 8 KiB
    w = lora_on(jax.random.key(0), np.zeros((E, width, width), np.float32), (4,) * E)
    x, sizes = np.ones((rows, width), np.float32), np.int32([rows] + [0] * (E - 1))

    def temporary(w, train):
        def loss(t, x):
            return jnp.sum(jnp.sin(grouped(x, train(t), sizes)))

        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(w, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    adapted = temporary((w.a, w.b), lambda t: w.__class__(**{**vars(w), "a": t[0], "b": t[1]}))
    base = temporary((), lambda t: w.base)
    assert adapted - base < 4 * E * width * width / 4
