"""Prefix tuning: learned keys and values that every token sees, in training, packing, padding and generation."""

import jax
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.generation import generate, prompt_batches
from lowrank.models import init_cache
from tests.support.close import assert_close
from tests.support.tiny_models import T, decoder, encoder, run, tokens

PACKED = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
P = 3


def close(a, b):
    assert_close(np.asarray(a, np.float32), np.asarray(b, np.float32))


def as_context(params, ids, keys, values):
    """The prefix that does what the tokens `ids` before a text do, from the keys and values they leave in a cache."""
    flat = lambda x: x[:, 0, : len(ids)].reshape(x.shape[0], len(ids), -1)  # noqa: E731
    return {**params, "prefix": {"k": flat(keys), "v": flat(values)}}


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_a_prefix_of_real_keys_and_values_acts_as_the_tokens_that_they_are_from(kind):
    model, params = decoder(kind, window=0) if kind == "gemma" else decoder(kind)
    ids = tokens(1)
    full, cache = run(model, params, ids, cache=init_cache(model.config, 1, T))
    with_prefix, _ = decoder(kind, prefix_length=P, **({"window": 0} if kind == "gemma" else {}))
    params = as_context(params, ids[0, :P], cache.keys["layers"], cache.values["layers"])
    close(run(with_prefix, params, ids[:, P:])[0], full[0, P:])


@pytest.mark.parametrize(("kind", "options"), [("windowed", {"num_prompt": 2}), ("gpt2", {})])
def test_packed_rows_with_a_prefix_equal_rows_of_their_own(kind, options):
    model, params = decoder(kind, prefix_length=P, **options)
    ids = tokens(1)
    first, second = run(model, params, ids[:, :5])[0], run(model, params, ids[:, 5:9])[0]
    explicit = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]], np.int32)
    for positions in (None, explicit):
        packed = run(model, params, ids, positions, PACKED)[0]
        close(packed[:5], first)
        close(packed[5:9], second)


@pytest.mark.parametrize(("kind", "options"), [("windowed", {}), ("gemma", {"num_prompt": 2, "top_layers": 2})])
def test_decoding_with_a_cache_and_a_prefix_equals_the_full_forward(kind, options):
    model, params = decoder(kind, prefix_length=P, **options)
    ids = tokens(2)
    segments = np.array([[0] * 3 + [1] * (T - 3), [1] * T], np.int32)  # the first row padded on the left
    positions = np.maximum(np.cumsum(segments, 1, dtype=np.int32) - 1, 0)
    full = run(model, params, ids, segments=segments)
    cache, parts = init_cache(model.config, 2, T), []
    for part in (slice(0, 7), slice(7, 8), slice(8, T)):
        h, cache = run(model, params, ids[:, part], positions[:, part], segments[:, part], cache)
        parts.append(h)
    real = segments[..., None] > 0
    close(np.concatenate(parts, 1) * real, full * real)


def test_greedy_generation_with_a_prefix_is_greedy_without_a_cache():
    model, params = decoder("llama", prefix_length=P)
    ids, row = [[5, 6, 7], [8, 9, 10, 11, 12]], [8, 9, 10, 11, 12]
    batch, segments = prompt_batches.left_pad(ids, 0, 8)
    new = generate.generate(model, params, batch, segments, max_new=3)
    whole = np.array([[*row, *np.asarray(new)[1]]], np.int32)
    want = run(model, params, whole, method="__call__")[0].argmax(-1)
    np.testing.assert_array_equal(new[1], want[len(row) - 1 : -1])
    alone = generate.generate(model, params, *prompt_batches.left_pad(ids[:1], 0, 8), max_new=3)
    np.testing.assert_array_equal(alone[0], new[0])


def test_an_encoder_sees_its_prefix_from_every_real_token_and_no_padding():
    model, params = encoder(num_labels=3, prefix_length=P, pooling="mean", top_layers=1)
    ids, pad = tokens(2, 8), np.full((2, 4), 7, np.int32)
    plain, ones = run(model, params, ids, method="__call__"), np.ones_like(ids)
    for order in (1, -1):
        row, segments = np.hstack([ids, pad][::order]), np.hstack([ones, 0 * pad][::order])
        close(run(model, params, row, segments, method="__call__"), plain)
    changed = {**params, "prefix": jax.tree.map(lambda x: x + 1.0, params["prefix"])}
    assert np.all(np.abs(run(model, changed, ids) - run(model, params, ids)).max(-1) > 1e-4)


def test_every_layers_prefix_gets_a_gradient_from_every_segment():
    model, params = decoder("gemma", prefix_length=P, remat="full")

    def loss(prefix, where):
        h = model.apply({"params": {**params, "prefix": prefix}}, tokens(1), segments=PACKED, method="features")
        return (where[..., None] * h**3).sum()

    gradient = jax.jit(jax.grad(loss))
    for n in (0, 1):
        for g in jax.tree.leaves(gradient(params["prefix"], np.arange(T)[None] // 5 == n)):
            assert np.all(np.any(np.asarray(g) != 0, axis=-1))


def test_a_prefix_that_does_not_fit_is_refused():
    model, params = decoder("gpt2", prefix_length=P)
    apply = lambda ids, **kw: model.apply({"params": params}, ids, **kw)  # noqa: E731
    with pytest.raises(UserError, match="30 tokens and 3 virtual tokens is longer than the model's 32 positions"):
        apply(tokens(1, 30))
    with pytest.raises(UserError, match="the cache has slots for 0 virtual tokens, and the model has 3 virtual tokens"):
        apply(tokens(1, 4), cache=init_cache(decoder("gpt2")[0].config, 1, 8))
    with pytest.raises(UserError, match="the cache has only 7 slots for 5 tokens and 3 virtual tokens"):
        apply(tokens(1, 5), cache=init_cache(model.config, 1, 4))
    with pytest.raises(UserError, match="prefix_length=-1 is below 0"):
        decoder("gpt2", prefix_length=-1)
