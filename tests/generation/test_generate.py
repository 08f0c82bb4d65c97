import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.generation import generate, prompt_batches, sampling
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
    tokens, segments = prompt_batches.left_pad(prompts, 0, LIMIT)
    return np.asarray(generate.generate(model, params, tokens, segments, max_new=max_new, **options))


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
def test_a_left_padded_batch_with_a_cache_equals_whole_sequences_without(options):
    model, params = _model(**options)
    out = _batch(model, params, _prompts(), 6)
    want = _without_cache(model, params, _prompts(), 6, lambda logits_BxV, n: np.argmax(logits_BxV, -1))
    assert out.tolist() == want
    assert len({token for row in want for token in row}) > 3


def test_sampling_draws_what_each_rows_key_draws_from_the_filtered_distribution():
    model, params = _model()
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    key = jax.random.key(7)
    out = _batch(model, params, _prompts(), 6, rng=key, **settings)

    @jax.jit
    def pick(logits_BxV, n):
        keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(key, row), n) for row in range(len(LENGTHS))])
        return sampling.next_token(logits_BxV, keys, sampling.Sampling(**settings))

    assert out.tolist() == _without_cache(model, params, _prompts(), 6, pick)
    assert (out == _batch(model, params, _prompts(), 6, rng=key, **settings)).all()
    assert (out != _batch(model, params, _prompts(), 6, rng=jax.random.key(8), **settings)).any()


def test_each_of_several_stop_tokens_ends_its_row_alone_and_padding_follows():
    model, params = _model()
    settings = {"temperature": 1.0, "rng": jax.random.key(0)}
    free = _batch(model, params, _prompts(), 6, **settings).tolist()
    stops = {free[0][2], free[1][4]}
    out = _batch(model, params, _prompts(), 6, stop_ids=stops, pad_id=V - 1, **settings).tolist()
    for row, whole in zip(out, free, strict=True):
        end = next((i + 1 for i, t in enumerate(whole) if t in stops), 6)
        assert row == whole[:end] + [V - 1] * (6 - end)
    assert [row.index(V - 1) for row in out[:2]] == [3, 5]


def test_decoding_ends_when_every_row_has_stopped():
    model, params = _model()
    tokens, segments = prompt_batches.left_pad(_prompts(), 0, LIMIT)
    second = tuple(_batch(model, params, _prompts(), 6)[:, 1].tolist())
    keys = generate.row_keys(jax.random.key(0), 4)
    out, steps = generate._generate(model, params, tokens, segments, keys, 40, second, sampling.Sampling(), 0)
    assert int(steps) <= 2
    assert not out[:, 2:].any()


def test_top_k_keeps_the_k_largest_and_ties_with_the_last():
    logits = jnp.array([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 1.0]])
    kept = np.isfinite(sampling.keep_top_k(logits, 2))
    assert kept.tolist() == [[True, False, True, False], [True, True, True, True]]
    assert np.isfinite(sampling.keep_top_k(logits, 0)).all()
    assert np.isfinite(sampling.keep_top_k(logits, 9)).all()


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, [1]), (0.4, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_likeliest_set_that_reaches_p(p, kept):
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    assert np.flatnonzero(np.isfinite(sampling.keep_top_p(logits, p)[0])).tolist() == kept


def test_temperature_sharpens_the_distribution_that_is_drawn_from():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = sampling.next_token(jnp.tile(logits, (4000, 1)), keys, sampling.Sampling(temperature=0.5))
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
    key, settings = jax.random.key(3), {"max_new": 5, "temperature": 1.0}
    whole = generate.texts(pretrained, params, prompts, batch_size=6, rng=key, **settings)
    ids = [_Letters().encode(p) for p in prompts]
    small = generate.texts(pretrained, params, ids, batch_size=2, rng=key, **settings)
    assert whole == small
    assert all("$" not in text for text in whole)
    free = generate.texts(pretrained, params, prompts[2:4], batch_size=2, rng=key, stop_ids=(), **settings)
    assert [len(text) for text in free] == [5, 5]
    assert generate.texts(pretrained, params, [], max_new=5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new": 54}, r"a prompt of 11 tokens \+ max_new=54 exceeds the model's 64 positions"),
        ({"max_new": 0}, "max_new=0"),
        ({"max_new": 2, "temperature": 1.0}, "needs rng"),
        ({"max_new": 2, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new": 2, "top_k": -1}, "top_k=-1"),
        ({"max_new": 2, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    model, params = _model()
    with pytest.raises(UserError, match=message):
        _batch(model, params, _prompts(), **options)


def test_an_empty_prompt_is_an_error():
    model, params = _model()
    with pytest.raises(UserError, match="prompt is empty"):
        _batch(model, params, [[1, 2], []], 2)


def test_prompts_up_to_the_last_position_fit():
    model, params = _model()
    assert _batch(model, params, _prompts((61, 5)), 3).shape == (2, 3)
