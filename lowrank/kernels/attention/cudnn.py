"""Attention by the fused kernel of cuDNN, which jax calls on NVIDIA GPUs; segments make a mask `[B, 1, T, S]`.

As lowered for CUDA, forward and backward, causal rows are its mask CAUSAL, with `sliding_window_length` as the window,
and segments are a bias. The key heads are not repeated. No GPU has checked the results.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels.attention import dense, sharded
from lowrank.kernels.attention.mask import Mask

MASKED_SCORES = 4096 * 4096  # T * S of the longest rows with a mask that is not static


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, scale: float | None = None, softcap: float = 0.0
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`, in half precision; `softcap` must be 0."""
    assert not softcap
    return dense.attend(q, k, v, mask, scale=scale, implementation="cudnn")


def refusal(q: Any, k: Any, mask: Mask, softcap: float) -> str:
    """The reason why cuDNN does not take these queries and keys (arrays or shapes), or an empty string."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if softcap:
        return "cuDNN has no soft cap"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in half precision, not in {q.dtype}"
    if T % 2 or S % 2 or H % 8 or H > 256:
        return f"cuDNN takes even lengths and heads of a multiple of 8 up to 256, not {T} queries, {S} keys and {H}"
    if mask.window and not mask.causal and mask.is_static:
        return "cuDNN's window is one of causal rows"
    if sharded.divides_tokens(jax.sharding.get_abstract_mesh(), T):
        return "cuDNN's masks do not know the part of a row that a device of mesh.context has"
    if not mask.is_static and T * S > MASKED_SCORES:
        return "cuDNN has no segments, and the bools of this mask would take too much memory"
    return _device_refusal(H)


def _device_refusal(H: int) -> str:
    capability = min((float(device.compute_capability) for device in nvidia_devices()), default=0.0)
    if capability < 8:
        return "cuDNN's kernel needs an NVIDIA GPU of the Ampere generation or later in this process"
    return f"cuDNN takes heads of up to 128 before Hopper, not {H}" if capability < 9 and H > 128 else ""


def nvidia_devices() -> list[Any]:
    """The NVIDIA GPUs of this process."""
    try:
        return [device for device in jax.devices("cuda") if "NVIDIA" in device.device_kind]
    except RuntimeError:
        return []
