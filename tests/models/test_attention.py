from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.models.attention import attend, cudnn_fits
from tests.support.close import assert_close

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
    assert_close(ours, reference(q, k, v, mask, scale or H**-0.5, cap))


@pytest.mark.parametrize("window", [0, 1, 3, T, T + 5])
def test_causal_attention_sees_its_window(window):
    q, k, v, _ = inputs()
    back = np.arange(T)[:, None] - np.arange(T)[None]
    mask = np.broadcast_to((back >= 0) & (back < (window or T)), (B, T, T))
    ours = jax.jit(lambda *a: attend(*a, causal=True, window=window))(q, k, v)
    assert_close(ours, reference(q, k, v, mask, H**-0.5, 0))


def test_the_softmax_is_float32_in_half_precision():
    q, k, v, mask = inputs()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    ours = attend(*half, mask[:, None])
    exact = reference(*half, mask, H**-0.5, 0)
    assert ours.dtype == jnp.bfloat16
    assert_close(np.asarray(ours, np.float64), exact, relative=0.02)


H100, A100, V100 = (
    SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {name}", compute_capability=capability)
    for name, capability in (("H100", "9.0"), ("A100", "8.0"), ("V100", "7.0"))
)
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
MI300 = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")


@pytest.mark.parametrize(
    ("device", "length", "keys", "width", "dtype", "fits"),
    [
        (H100, 128, 128, 256, jnp.bfloat16, True),
        (A100, 128, 256, 128, jnp.float16, True),
        (A100, 128, 128, 256, jnp.bfloat16, False),
        (V100, 128, 128, 64, jnp.float16, False),
        (H100, 128, 128, 64, jnp.float32, False),
        (H100, 128, 128, 60, jnp.bfloat16, False),
        (H100, 1, 128, 64, jnp.bfloat16, False),
        (H100, 128, 129, 64, jnp.bfloat16, False),
        (MI300, 128, 128, 64, jnp.bfloat16, False),
        (CPU, 128, 128, 64, jnp.bfloat16, False),
    ],
)
def test_cudnn_is_asked_only_for_what_it_takes(device, length, keys, width, dtype, fits):
    assert cudnn_fits(jax.ShapeDtypeStruct((1, length, 4, width), dtype), keys, device) is fits
