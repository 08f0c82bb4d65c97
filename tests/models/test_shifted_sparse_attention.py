"""Shifted sparse attention beside attention written token by token in float64, and where the decoder uses it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.kernels.attention import dispatch
from lowrank.kernels.attention.mask import Mask, Tokens
from lowrank.models import DecoderConfig, build_model, inference_config
from lowrank.models.shifted_sparse_attention import attend_shifted
from tests.support.close import assert_close, difference
from tests.support.tiny_models import LLAMA, SIZES, decoder, run, tokens

B, H = 2, 6


def reference(q, k, v, segments, group, window, cap):
    """LongLoRA's attention, one query at a time: the keys of its segment and group, up to itself."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    out = np.zeros_like(q)
    for b, n, t in np.ndindex(B, N, T):
        shift = group // 2 if n >= N // 2 else 0
        keys = [
            s
            for s in range(t + 1)
            if (s + shift) // group == (t + shift) // group
            and segments[b, s] == segments[b, t]
            and (not window or t - s < window)
        ]
        scores = q[b, t, n] @ k[b, keys, n // (N // K)].T * H**-0.5
        scores = cap * np.tanh(scores / cap) if cap else scores
        p = np.exp(scores - scores.max())
        out[b, t, n] = p / p.sum() @ v[b, keys, n // (N // K)]
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "group", "packed", "window", "cap"),
    [
        (4, 2, 16, 4, False, 0, 0.0),
        (4, 4, 13, 4, True, 0, 0.0),
        (6, 3, 10, 6, False, 3, 0.0),
        (9, 3, 9, 12, True, 0, 2.0),
        (4, 1, 7, 2, False, 0, 0.0),
    ],
)
def test_tokens_attend_within_their_group_and_half_of_the_heads_are_shifted(
    heads, kv_heads, length, group, packed, window, cap
):
    rng = np.random.default_rng(0)
    q, k, v = (2 * rng.standard_normal((B, length, n, H)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.ones((B, length), np.int32)
    segments[:, length // 3 :] += packed
    tokens = Tokens(jnp.asarray(segments)) if packed else Tokens()
    mask = Mask(tokens, tokens, causal=True, window=window)
    attend = partial(dispatch.attend, softcap=cap)
    ours = jax.jit(lambda *x: attend_shifted(attend, *x, group))(q, k, v, mask)
    assert_close(ours, reference(q, k, v, segments, group, window, cap))


def test_the_decoder_trains_in_groups_and_decodes_with_full_attention():
    model, params = decoder("llama", shift_group=4)
    whole = build_model(inference_config(model.config))
    ids = tokens(2, 12)
    near, full = run(model, params, ids), run(whole, params, ids)
    assert_close(near[:, :2], full[:, :2])  # half a group sees all before it
    assert difference(near[:, 2:], full[:, 2:]) > 1e-2
    assert_close(run(model, params, ids, method="prefill")[0], full)
    segments = np.ones_like(ids)
    assert_close(run(model, params, ids, segments=segments), near)


@pytest.mark.parametrize("options", [{"shift_group": 3}, {"shift_group": -2}, {"shift_group": 4, "num_prompt": 2}])
def test_groups_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="must be a positive even number of tokens"):
        DecoderConfig(**{**SIZES, **LLAMA, **options})
