import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.models import DecoderConfig
from lowrank.models.rope import RopeScaling
from tests.support.close import assert_close
from tests.support.tiny_models import DECODERS, SIZES, T, decoder, next_features, run, run_in_parts, sight, tokens

PACKED = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
BACK = np.arange(T)[:, None] - np.arange(T)[None]


def close(a, b):
    assert_close(np.asarray(a, np.float32), np.asarray(b, np.float32), relative=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_a_token_depends_on_itself_and_all_before_it_and_none_after(kind):
    assert np.array_equal(sight(*decoder(kind, window=0)), BACK >= 0)


@pytest.mark.parametrize(
    ("kind", "options", "window", "segments"),
    [
        ("windowed", {"layers": 1}, 4, None),
        ("windowed", {"layers": 1}, 4, PACKED),
        ("gemma", {"layers": 1, "local_layers": (True,)}, 4, PACKED),
        ("gemma", {"layers": 1, "local_layers": (False,)}, T, None),
    ],
)
def test_a_local_layer_sees_its_window_and_a_global_one_everything(kind, options, window, segments):
    together = BACK >= 0 if segments is None else (segments[0][:, None] == segments[0][None]) & (BACK >= 0)
    assert np.array_equal(sight(*decoder(kind, **options), segments), together & (window > BACK))


def apart(ids):
    """Each segment of a row as a row of its own, at the start."""
    rows = np.zeros((2, T), np.int32)
    rows[0, :5], rows[1, :4] = ids[0, :5], ids[0, 5:9]
    return rows, np.array([[1] * 5 + [0] * 7, [1] * 4 + [0] * 8], np.int32)


@pytest.mark.parametrize(("kind", "prompt"), [("windowed", 3), ("gpt2", 0), ("gemma", 3)])
def test_packed_rows_equal_rows_of_their_own(kind, prompt):
    model, params = decoder(kind, num_prompt=prompt)
    ids = tokens(1)
    rows, segments = apart(ids)
    alone = run(model, params, rows, segments=segments)
    explicit = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]], np.int32)
    for positions in (None, explicit):
        packed = run(model, params, ids, positions, PACKED)[0]
        close(packed[:5], alone[0, :5])
        close(packed[5:9], alone[1, :4])


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_on_either_side_changes_nothing(kind):
    model, params = decoder(kind)
    ids, pad = tokens(2, 8), np.full((2, T - 8), 7, np.int32)
    plain = run(model, params, ids)
    ones = np.ones_like(ids)
    left = run(model, params, np.hstack([pad, ids]), segments=np.hstack([0 * pad, ones]))
    right = run(model, params, np.hstack([ids, pad]), segments=np.hstack([ones, 0 * pad]))
    close(left[:, T - 8 :], plain)
    close(right[:, :8], plain)


LONGROPE = RopeScaling("longrope", original_positions=4, short=(1.0, 2.0), long=(1.0, 3.0), attention_factor=1.2)
PHI = {"fused_qkv": True, "fused_gate_up": True, "rotary_dim": 4, "rope_scaling": LONGROPE}
PHI |= {"pre_norms": False, "post_norms": True, "wide_qk_norm": True, "residual_scale": 0.5}
NEOX = {"learned_positions": False, "parallel_residual": True, "qkv_by_head": True}
NEOX |= {"rotary_dim": 2, "rope_layers": (True, False)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("windowed", {"num_prompt": 2}),
        ("gpt2", {"top_layers": 1}),
        ("gemma", {"num_prompt": 2, "top_layers": 2}),
        ("llama", PHI),
        ("gpt2", {**NEOX, "top_layers": 1}),
    ],
)
def test_decoding_with_a_cache_equals_the_full_forward(kind, options):
    model, params = decoder(kind, **options)
    ids, lengths, parts = tokens(2), (3, 7), (1, 1, 3)
    full = next_features(run(model, params, ids), lengths, sum(parts))
    close(run_in_parts(model, params, ids, lengths, parts), full)


def test_virtual_tokens_are_seen_from_every_segment():
    model, params = decoder("windowed", layers=1, num_prompt=2, window=8)

    def loss(prompt, where):
        swapped = {**params, "prompt": {"embedding": prompt}}
        h = model.apply({"params": swapped}, tokens(1), segments=PACKED, method="features")
        return jnp.sum(jnp.where(where[..., None], h, 0) ** 3)

    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(params["prompt"]["embedding"], np.arange(T)[None] // 5 == n) for n in (0, 1)]
    assert all(np.all(np.any(np.asarray(g) != 0, axis=-1)) for g in grads)


@pytest.mark.parametrize(("kind", "top"), [("gemma", 1), ("llama", 2)])
def test_top_layers_are_the_same_layers_in_a_stack_of_their_own(kind, top):
    model, params = decoder(kind)
    first = model.config.layers - top
    split = {k: v for k, v in params.items() if k != "layers"}
    split["top"] = jax.tree.map(lambda x: x[first:], params["layers"])
    if first:
        split["layers"] = jax.tree.map(lambda x: x[:first], params["layers"])
    close(run(decoder(kind, top_layers=top)[0], split, tokens(1)), run(model, params, tokens(1)))


def test_every_remat_policy_and_unrolling_gives_the_same_gradient():
    def gradient(**options):
        model, params = decoder("llama", **options)
        loss = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, tokens(2)) ** 2))
        return jax.jit(loss)(params)

    plain = gradient(remat="none")
    named = {"remat": "offload", "remat_names": ("input", "up", "attn")}
    for options in (
        {"remat": "full"},
        {"remat": "dots", "unroll": 2},
        {"remat": "dots_all"},
        {"remat": "names"},
        named,
    ):
        jax.tree.map(close, gradient(**options), plain)


def test_logits_are_float32_and_capped_when_layers_compute_in_half_precision():
    model, params = decoder("gemma", dtype="bfloat16")
    logits = run(model, params, tokens(1), method="__call__")
    single = run(*decoder("gemma"), tokens(1), method="__call__")
    assert run(model, params, tokens(1)).dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert np.abs(logits).max() <= 5.0
    assert_close(logits, single, relative=0.04)


def test_a_classifier_reads_the_last_real_token():
    model, params = decoder("llama", num_labels=3)
    ids, pad = tokens(2, 8), np.full((2, 4), 7, np.int32)
    ones = np.ones_like(ids)
    want = run(model, params, ids)[:, -1] @ params["head"]["kernel"]
    rows = [(ids, None), (np.hstack([pad, ids]), [0 * pad, ones]), (np.hstack([ids, pad]), [ones, 0 * pad])]
    for row, segments in rows:
        segments = None if segments is None else np.hstack(segments)
        close(run(model, params, row, segments=segments, method="__call__"), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "dot"}, "unknown remat policy 'dot' .did you mean 'dots'"),
        ({"remat": "names", "remat_names": ("quiery",)}, "in remat_names 'quiery' .did you mean 'query'"),
        ({"remat": "full", "remat_names": ("query",)}, "remat_names needs remat=names or remat=offload"),
        ({"dtype": "float23"}, "unknown compute dtype 'float23'"),
        ({"top_layers": 3}, "top_layers=3 is not in -2..2: the model has 2 layers"),
        ({"num_prompt": -1}, "num_prompt=-1 is below 0"),
        ({"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"window": 4, "local_layers": (True,)}, "local_layers has 1 value for layers=2"),
    ],
)
def test_an_impossible_config_names_the_culprit(options, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**{**SIZES, **DECODERS["llama"], **options})


def test_a_sequence_beyond_the_positions_is_refused():
    model, params = decoder("gpt2", num_prompt=3)
    with pytest.raises(UserError, match="30 tokens and 3 virtual tokens is longer than the model's 32 positions"):
        model.apply({"params": params}, tokens(1, 30))
