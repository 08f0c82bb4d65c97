import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.generation import generate, generator, prompt_batches, sampling
from lowrank.models import DecoderConfig, build_model
from tests.support.close import assert_close

V, LIMIT = 61, 64
SIZES = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 48}
LENGTHS = (3, 11, 7, 5)


@functools.cache
def _model(**options):
    model = build_model(DecoderConfig(vocab_size=V, max_positions=LIMIT, **SIZES, **options))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), params)


def _prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(1, V, n).tolist() for n in lengths]


_forward = jax.jit(lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnames="model")


def _without_cache(model, params, prompts, max_new, pick):
    """Each row's whole sequence anew for each token; padding is on the right, where no token sees it."""
    ends = np.array([len(p) for p in prompts])
    tokens = np.zeros((len(prompts), max(ends) + max_new), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for n in range(max_new):
        tokens[rows, ends + n] = pick(_forward(model, params, tokens)[rows, ends + n - 1], n)
    return [tokens[row, end : end + max_new].tolist() for row, end in enumerate(ends)]


def _batch(model, params, prompts, max_new, **options):
    return generate.generate(model, params, prompts, max_new=max_new, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_prompt": 3, "dtype": "bfloat16"},
        {"learned_positions": True, "norm": "layer", "gated": False},
        {"window": 4, "local_layers": (True, False), "final_logit_softcap": 5.0, "top_layers": 1},
    ],
    ids=["llama", "virtual prompt", "gpt2", "local layers"],
)
def test_a_padded_batch_with_a_cache_equals_whole_sequences_without(options):
    model, params = _model(**options)
    out = _batch(model, params, _prompts(), 6)
    want = _without_cache(model, params, _prompts(), 6, lambda logits_BxV, n: np.argmax(logits_BxV, -1))
    assert out == want
    assert len({token for row in want for token in row}) > 3


def test_sampling_draws_what_each_rows_key_draws_from_the_filtered_distribution():
    model, params = _model()
    settings = sampling.Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    key, seen = jax.random.key(7), np.zeros((len(LENGTHS), V), bool)
    out = _batch(model, params, _prompts(), 6, rng=key, sampling=settings)
    for row, prompt in zip(seen, _prompts(), strict=True):
        row[prompt] = True

    def pick(logits_BxV, n):
        keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(key, row), n) for row in range(len(LENGTHS))])
        drawn = np.asarray(_next_tokens(logits_BxV, keys, sampling.stack_settings([settings] * 4), seen))
        seen[np.arange(len(LENGTHS)), drawn] = True
        return drawn

    assert out == _without_cache(model, params, _prompts(), 6, pick)
    assert out != _batch(model, params, _prompts(), 6, rng=jax.random.key(8), sampling=settings)


_next_tokens = jax.jit(sampling.next_tokens)


def test_each_of_several_stop_tokens_ends_its_row_alone_and_is_its_last():
    model, params = _model()
    settings = {"sampling": sampling.Sampling(temperature=1.0), "rng": jax.random.key(0)}
    free = _batch(model, params, _prompts(), 6, **settings)
    stops = {free[0][2], free[1][4]}
    out = _batch(model, params, _prompts(), 6, stop_ids=stops, **settings)
    for row, whole in zip(out, free, strict=True):
        assert row == whole[: next((i + 1 for i, t in enumerate(whole) if t in stops), 6)]
    assert [len(row) for row in out[:2]] == [3, 5]


def _requests(settings, seed=0):
    keys = generate.key_data(jax.random.key(seed), len(LENGTHS))
    of_row = [sampling.Sampling(**s) for s in settings]
    limits = (2, 7, 6, 6)
    return [generator.Request(p, n, (5, 6), s, k) for p, n, s, k in zip(_prompts(), limits, of_row, keys, strict=True)]


def test_rows_are_used_again_and_no_setting_compiles_anything():
    model, params = _model()
    greedy, mixed = [{}] * 4, [{}, {"temperature": 0.7, "top_k": 4}, {"repetition_penalty": 1.5}, {"temperature": 2.0}]
    first, again, alone = _requests(greedy), _requests(mixed, 1), []
    for request in again:
        alone += [text for _, text in generate.complete(model, params, [request])]
    run = generator.Generator(model, params, generator.Sizes(rows=3, slots=32, max_new=16, stops=8))
    seen = []
    texts = dict(run.complete(first))
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
    try:
        mixed_texts = dict(run.complete(again))
        streamed = list(run.stream(again[1]))
        assert not [event for event in seen if "compile" in event]
        jax.jit(lambda x: x + 17)(1.0)  # which the listener must hear
        assert [event for event in seen if "compile" in event]
    finally:
        jax.monitoring.clear_event_listeners()
    assert [len(texts[i]) for i in (0, 2, 3)] == [2, 6, 6]
    assert mixed_texts == dict(enumerate(alone))
    assert streamed == [alone[1][: i + 1] for i in range(len(alone[1]))]


def test_a_text_that_ends_early_frees_its_row_for_the_next_prompt(monkeypatch):
    model, params = _model()
    calls, decode = [], generator.decode

    def counted(*args):
        calls.append(args[-2:])
        return decode(*args)

    monkeypatch.setattr(generator, "decode", counted)
    run = generator.Generator(model, params, generator.Sizes(rows=2, slots=32, max_new=16, stops=8))
    requests = [generator.Request(p, n) for p, n in zip(_prompts(), (16, 2, 3, 2), strict=True)]
    assert [i for i, _ in run.complete(requests)] == [1, 2, 0, 3]
    assert [bool(pause) for _, pause in calls] == [True, True, False]


def _kept(logits, **settings):
    rows = sampling.stack_settings([sampling.Sampling(temperature=1.0, **settings)] * len(logits))
    return np.isfinite(jax.jit(sampling.filter_logits)(jnp.asarray(logits), rows))


def test_top_k_keeps_the_k_largest_and_ties_with_the_last():
    logits = [[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 1.0]]
    assert _kept(logits, top_k=2).tolist() == [[True, False, True, False], [True, True, True, True]]
    assert _kept(logits, top_k=0).all()
    assert _kept(logits, top_k=9).all()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.79}, [1, 3]),
        ({"top_p": 0.81}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.25}, [0, 1, 3]),
        ({"min_p": 0.65}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1]),
    ],
)
def test_top_p_and_min_p_keep_the_likeliest_tokens(settings, kept):
    logits = np.log(np.float32([[0.15, 0.5, 0.05, 0.3]]))
    assert np.flatnonzero(_kept(logits, **settings)[0]).tolist() == kept


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    rows = sampling.stack_settings([sampling.Sampling(repetition_penalty=2.0)])
    logits = sampling.penalize(jnp.array([[4.0, -4.0, 4.0]]), rows, jnp.array([[True, True, False]]))
    assert logits.tolist() == [[2.0, -8.0, 4.0]]


def test_temperature_sharpens_the_distribution_that_is_drawn_from():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    keys, rows = jax.random.split(jax.random.key(0), 4000), sampling.stack_settings([sampling.Sampling(0.5)] * 4000)
    draws = _next_tokens(jnp.tile(logits, (4000, 1)), keys, rows, np.zeros((4000, 3), bool))
    want = np.array([0.49, 0.04, 0.01]) / 0.54
    assert_close(np.bincount(draws, minlength=3) / 4000, want, relative=0.03)


def test_lengths_fall_into_few_buckets_that_waste_little():
    sizes = {prompt_batches.bucket(n) for n in range(1, 2049)}
    assert all(n <= prompt_batches.bucket(n) <= max(16, n * 1.25 + 16) for n in range(1, 2049))
    assert len(sizes) <= 30


class _Letters:
    """A tokenizer of small letters, `.` and the end `$`."""

    pad_id, eos_id, bos_id = 0, 1, None
    stop_ids = (1,)

    def encode(self, text):
        return [ord(c) - ord("a") + 3 if c.isalpha() else 2 for c in text]

    encode_special = encode

    def encode_offsets(self, text):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]

    def decode(self, ids):
        return "".join("#$."[i] if i < 3 else chr(i - 3 + ord("a")) for i in ids)


def test_texts_keep_their_order_and_do_not_depend_on_their_batch():
    model, params = _model()
    pretrained = types.SimpleNamespace(config=model.config, tokenizer=_Letters())
    prompts = ["abc", "a" * 20, "hello.world", "q", "lowrank", "zz.top"]
    key, settings = jax.random.key(3), {"max_new": 5, "sampling": sampling.Sampling(temperature=1.0)}
    whole = generate.texts(pretrained, params, prompts, batch_size=6, rng=key, **settings)
    ids = [_Letters().encode(p) for p in prompts]
    small = generate.texts(pretrained, params, ids, batch_size=2, rng=key, **settings)
    assert whole == small
    assert all("$" not in text for text in whole)
    free = generate.texts(pretrained, params, prompts[2:4], batch_size=2, rng=key, stop_ids=(), **settings)
    assert [len(text) for text in free] == [5, 5]
    stop = whole[0][1:3]  # of two tokens
    cut = generate.texts(pretrained, params, prompts, stop=[stop], rng=key, **settings)
    assert cut == [text.partition(stop)[0] for text in whole]
    assert generate.texts(pretrained, params, [], max_new=5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        sampling.Sampling(**options)


@pytest.mark.parametrize(
    ("prompts", "max_new", "message"),
    [
        (LENGTHS, 54, r"a prompt of 11 tokens \+ max_new=54 exceeds the model's 64 positions"),
        (LENGTHS, 0, "max_new=0"),
        ((2, 0), 2, "prompt is empty"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, max_new, message):
    model, params = _model()
    with pytest.raises(UserError, match=message):
        _batch(model, params, _prompts(prompts), max_new)


def test_prompts_up_to_the_last_position_fit():
    model, params = _model()
    assert [len(text) for text in _batch(model, params, _prompts((61, 5)), 3)] == [3, 3]
