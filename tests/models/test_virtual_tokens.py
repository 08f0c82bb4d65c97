"""Prefix tuning: learned keys and values that every token sees, in training, packing, padding and generation."""

import jax
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.generation import generate
from tests.support.close import assert_close
from tests.support.tiny_models import T, decoder, encoder, next_features, run, run_in_parts, tokens

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
    full, entries = run(model, params, ids, method="prefill")
    with_prefix, _ = decoder(kind, prefix_length=P, **({"window": 0} if kind == "gemma" else {}))
    params = as_context(params, ids[0, :P], entries["layers"].keys, entries["layers"].values)
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
    ids, lengths, parts = tokens(2), (4, 7), (1, 4)
    full = next_features(run(model, params, ids), lengths, sum(parts))
    close(run_in_parts(model, params, ids, lengths, parts), full)


def test_greedy_generation_with_a_prefix_is_greedy_without_a_cache():
    model, params = decoder("llama", prefix_length=P)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    for prompt, new in zip(prompts, generate.generate(model, params, prompts, max_new=3), strict=True):
        whole = np.array([[*prompt, *new]], np.int32)
        want = run(model, params, whole, method="__call__")[0].argmax(-1)
        np.testing.assert_array_equal(new, want[len(prompt) - 1 : -1])


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
    with pytest.raises(UserError, match="prefix_length=-1 is below 0"):
        decoder("gpt2", prefix_length=-1)
