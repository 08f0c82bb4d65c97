import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.models.attention import attend

B, T, N, K, H = 2, 9, 4, 2, 8


def reference(q, k, v, mask, scale, cap):
    """Attention head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, n in np.ndindex(B, N):
        s = q[b, :, n] @ k[b, :, n // (N // K)].T * scale
        s = np.where(mask[b], cap * np.tanh(s / cap) if cap else s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        out[b, :, n] = p / p.sum(-1, keepdims=True) @ v[b, :, n // (N // K)]
    return out


def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (2 * rng.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    mask = (rng.random((B, T, T)) < 0.5) | np.eye(T, dtype=bool)
    return q, k, v, mask


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_masked_attention_equals_float64_head_by_head(cap, scale):
    q, k, v, mask = inputs()
    ours = jax.jit(lambda *a: attend(*a, scale=scale, softcap=cap))(q, k, v, mask[:, None])
    np.testing.assert_allclose(ours, reference(q, k, v, mask, scale or H**-0.5, cap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 3, T, T + 5])
def test_causal_attention_sees_its_window(window):
    q, k, v, _ = inputs()
    back = np.arange(T)[:, None] - np.arange(T)[None]
    mask = np.broadcast_to((back >= 0) & (back < (window or T)), (B, T, T))
    ours = jax.jit(lambda *a: attend(*a, causal=True, window=window))(q, k, v)
    np.testing.assert_allclose(ours, reference(q, k, v, mask, H**-0.5, 0), rtol=1e-4, atol=1e-5)


def test_the_softmax_is_float32_in_half_precision():
    q, k, v, mask = inputs()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    ours = attend(*half, mask[:, None])
    exact = reference(*half, mask, H**-0.5, 0)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=2**-7 * np.abs(exact).max())
