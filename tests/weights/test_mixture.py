"""Mixtures of LoRAs in float64 NumPy: routed by the token, routed once by the prompt, and kept in balance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo
from lowrank.core.weight import dot, form, merge, with_gates
from lowrank.generation import generate
from lowrank.weights import mixture, smore
from tests.support.close import assert_close, difference
from tests.support.tiny_models import decoder, normal, run, tokens

E, R, IN, OUT = 4, 2, 6, 5
product = jax.jit(dot)
scanned = jax.jit(lambda x, w: jax.lax.scan(lambda _, layer: (None, dot(x, layer)), None, w)[1])


def mixed(per_token=2):
    w = mixture.attach(jax.random.key(0), normal(1, IN, OUT), rank=R, experts=E, alpha=3.0, per_token=per_token)
    return dataclasses.replace(w, b=normal(2, *w.b.shape))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_each_token_meets_its_own_experts_in_float64():
    w, x = mixed(), normal(3, 2, 3, IN)
    base, a, b, router = (np.asarray(t, np.float64) for t in (w.base, w.a, w.b, w.router))
    expected = np.zeros((2, 3, OUT))
    for at in np.ndindex(2, 3):
        token = np.asarray(x[at], np.float64)
        probs = softmax(token @ router)
        chosen = np.argsort(-probs)[:2]
        expected[at] = token @ base
        for e in chosen:
            A, B = a[:, e * R : (e + 1) * R], b[e * R : (e + 1) * R]
            expected[at] += 3.0 / R * probs[e] / probs[chosen].sum() * (token @ A @ B)
    assert_close(product(x, w), expected)


def test_it_starts_as_the_base_and_slices_under_scan():
    kernel, x = normal(1, 3, IN, OUT), normal(3, 2, 4, IN)
    w = mixture.attach(jax.random.key(0), kernel, rank=R, experts=E, alpha=3.0, per_token=1)
    assert_close(scanned(x, w), np.einsum("bti,lio->lbto", x, kernel))


@pytest.mark.parametrize(("experts", "fanout"), [((3, 4), (2, 2)), ((3,), (2,)), ((2, 3, 4), (1, 2, 3))])
def test_a_tree_of_residuals_is_walked_as_in_the_paper_in_float64(experts, fanout):
    kernel, x = normal(1, IN, OUT), normal(3, 2, 3, IN)
    made = {"rank": R, "experts": experts, "fanout": fanout, "gate": 4, "scale": 0.7, "activation": "tanh"}
    w = smore.attach(jax.random.key(0), kernel, **made)
    w = dataclasses.replace(w, up=normal(2, *w.up.shape))
    p, y = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), w), np.asarray(product(x, w))

    def node(level, token, context):
        scores = p.keys[level] @ (np.maximum(context @ p.hidden[level], 0) @ p.queries[level])
        best = np.argsort(-scores)[: fanout[level]]
        total = 0
        for child, g in zip(best, softmax(scores[best]), strict=True):
            a = p.downs[level][:, child * R : (child + 1) * R]
            h = token @ a @ p.ups[level][child]
            if level:
                h = h + node(level - 1, token, np.concatenate([context, p.keys[level][child]])) @ p.mixes[level - 1]
            total = total + g * np.tanh(h)
        return total

    for at in np.ndindex(2, 3):
        token = np.asarray(x[at], np.float64)
        expected = token @ p.base + 0.7 * node(len(experts) - 1, token, token @ p.narrow) @ p.up
        assert_close(y[at], expected)


def test_a_tree_slices_under_scan_and_trains_in_balance():
    kernel, x = normal(1, 3, IN, OUT), normal(3, 2, 4, IN)
    w = smore.attach(
        jax.random.key(0), kernel, rank=R, experts=(3, 2), fanout=(2, 1), gate=4, scale=1.0, activation="relu"
    )
    assert_close(scanned(x, w), np.einsum("bti,lio->lbto", x, kernel))
    layer = jax.tree.map(lambda leaf: np.asarray(leaf)[0], w)
    bound = dataclasses.replace(layer, mask=np.ones((2, 4), np.float32), strength=np.float32(1))

    @jax.jit
    def gradient(w):
        return jax.grad(lambda keys: jnp.sum(dot(x, dataclasses.replace(w, keys=keys))))(w.keys)

    grads = [jax.tree.map(np.asarray, gradient(w)) for w in (layer, bound)]
    assert not any(np.any(g) for g in grads[0])  # nothing is handed on yet
    assert all(np.any(g) for g in grads[1])


def test_a_routed_weight_cannot_be_merged():
    with pytest.raises(UserError, match="Mixture routes each input to other experts, so it cannot be merged"):
        merge({"kernel": mixed()})


def test_balance_adds_exactly_the_gradient_of_its_loss():
    """E sum_e f_e P_e times the strength, over the tokens that count, f held constant."""
    logits = normal(4, 2, 3, E)
    mask, strength, k = np.float32([[1, 1, 1], [1, 0, 0]]), np.float32(0.7), 2

    @jax.jit
    def routed(logits, strength):
        return jnp.sum(jnp.sin(mixture.top_k_gates(logits, k, mask, strength)))

    gradient = jax.jit(jax.grad(routed))
    found = np.asarray(gradient(logits, strength)) - gradient(logits, None)

    def loss(logits):
        probs = jax.nn.softmax(logits)
        share = jax.lax.stop_gradient(mixture.top_k_mask(probs, k)) / k
        mean = lambda v: jnp.sum(v * jnp.broadcast_to(mask[..., None], v.shape), axis=(0, 1)) / 4  # noqa: E731
        return 0.7 * E * jnp.sum(mean(share) * mean(probs))

    assert_close(found, jax.jit(jax.grad(loss))(logits))
    assert_close(jax.jit(jax.grad(routed, argnums=1))(logits, strength), loss(logits) / strength)  # the value to report
    assert routed(logits, strength) == routed(logits, None)


def test_balance_grows_with_its_scale_and_with_the_weight_of_the_batch():
    _, params = decoder("llama")
    method = methods.build_method({"name": "more", "balance": 0.5})
    params = methods.attach(method, params, jax.random.key(0))
    batch = BatchInfo(np.int32([[1, 1, 0]]), weight=np.float32(1))
    params = method.hooks.regularizer(lambda params: params, params, batch, 3.0)
    w = params["layers"]["attn"]["q"]["kernel"]
    assert w.mask.shape == (2, 1, 3)
    np.testing.assert_array_equal(w.mask[1], [[1, 1, 0]])
    assert_close(w.strength, [1.5, 1.5])


TARGET = r"layers/attn/(q|k|v)/kernel"


@functools.cache
def prompted():
    model, params = decoder("llama")
    method = methods.build_method({"name": "milora", "rank": 2, "per_prompt": 2, "target": TARGET})
    params = methods.attach(method, params, jax.random.key(0))
    shaken = lambda n, x: x + 0.3 * normal(len(n), *x.shape) if n.endswith("/b") else x  # noqa: E731
    return model, method, tree.map_named(shaken, params)


SEEN = []


@form
class Spy(mixture.PromptRouter):
    def gates(self, h):
        found = super().gates(h)
        if not isinstance(h, jax.core.Tracer):
            SEEN.append([np.asarray(x, np.float64) for x in (h, found)])
        return found


def test_gates_are_the_top_of_each_layers_router_over_the_prompts_hidden_states():
    model, method, params = prompted()
    ids, segments = tokens(1, 6), np.array([[1, 1, 1, 2, 2, 0]])
    bound = method.bind(params, BatchInfo(segments, prompt=np.array([[1, 1, 0, 1, 0, 0]], bool)), None)
    router = bound["layers"]["router"]
    bound["layers"]["router"] = Spy(**{f.name: getattr(router, f.name) for f in dataclasses.fields(router)})
    SEEN.clear()
    with jax.disable_jit():  # the layers' scan is a loop then, which the spy sees the values of
        run(model, bound, ids, segments=segments)
    assert len(SEEN) == 2
    assert_close(SEEN[0][0], np.asarray(params["embed"]["embedding"])[ids])
    assert difference(SEEN[1][0], SEEN[0][0]) > 0.1
    for (h, gates), kernel in zip(SEEN, np.asarray(params["shared"]["router"]["layers"], np.float64), strict=True):
        for t, prompt in ((0, [0, 1]), (2, [0, 1]), (3, [3]), (4, [3])):
            pooled = h[0, prompt].mean(0)
            gelu = 0.5 * pooled * (1 + np.tanh(np.sqrt(2 / np.pi) * (pooled + 0.044715 * pooled**3)))
            probs = softmax(gelu @ kernel)
            kept = np.where(probs >= np.sort(probs)[1], probs, 0)
            assert_close(gates[0, t], 2 * kept / kept.sum())


def test_each_weight_is_handed_its_own_gate():
    _, method, params = prompted()
    bound = method.bind(params, BatchInfo(np.ones((1, 2), np.int32)), None)
    layer = with_gates(jax.tree.map(lambda x: np.asarray(x)[0], bound["layers"]), np.array([[[0.0, 0.5, 1.5]]]))
    assert [float(layer["attn"][m]["kernel"].gate.item()) for m in "kqv"] == [0.0, 0.5, 1.5]


def test_a_gate_weighs_the_update_of_its_lora():
    ones = functools.partial(np.ones, dtype=np.float32)
    x, kernel = ones((2, 3, IN)), 0 * ones((IN, OUT))
    made = {"a": ones((IN, R)), "b": ones((R, OUT)), "scale": np.float32(0.5), "base": kernel}
    gate = np.float32([[0], [2]])
    y = product(x, mixture.Gated(**made, gate=gate))
    assert_close(y, np.array([0.0, 2.0])[:, None, None] * 0.5 * IN * R * np.ones((2, 3, OUT)))
    with pytest.raises(UserError, match="bind it to a batch"):
        dot(x, mixture.Gated(**made))


def test_generation_routes_once_by_the_prompt_whatever_its_padding():
    """The tokens are those that a whole row gives, whose prompt is marked as in training."""
    model, method, params = prompted()
    ids, new = tokens(1, 5), 3
    prompts = [ids[0].tolist(), ids[0, :3].tolist()]  # the second one is padded
    found = np.array(generate.generate(model, params, prompts, max_new=new, bind=method.bind))
    for prompt, text in zip(prompts, found, strict=True):
        row = np.array([[*prompt, *text[:-1]]], np.int32)
        ones, mask = np.ones_like(row), np.arange(row.shape[1])[None] < len(prompt)
        bound = method.bind(params, BatchInfo(ones, prompt=mask), None)
        logits = run(model, bound, row, segments=ones, method="__call__")
        np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1 :], axis=-1), text)


def test_milora_trains_the_experts_and_a_router_a_layer():
    _, method, params = prompted()
    trained = tree.leaf_names(tree.split(params, methods.trainable_mask(method, params))[0])
    assert sorted(trained) == sorted(
        [*(f"layers/attn/{m}/kernel/{f}" for m in "qkv" for f in "ab"), "shared/router/layers"]
    )
