"""Attention by jax's splash kernel for TPUs, which keeps scores on the chip and skips blocks that no query sees.

The mask of causal attention and of a window is static, and segments are compared for equality only. So a window is a
distance of slots: within a segment, tokens lie side by side and positions count up by one. Rows are padded to whole
blocks by tokens of a segment of their own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels.attention import sharded
from lowrank.kernels.attention.mask import Mask

BLOCK = 512  # queries, and keys, whose scores exist at a time
LANES = 128  # of which blocks are multiples
FILL = jnp.iinfo(jnp.int32).max  # the segment of the padding


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`; `refusal` is empty. `interpret` runs it without a TPU."""
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    return sharded.over_mesh(functools.partial(_attend, softcap, interpret), q, k, v, mask)


def refusal(q: Any, k: Any, mask: Mask, softcap: float) -> str:
    """The reason why splash does not take these queries and keys (arrays or shapes), or an empty string."""
    del softcap
    if mask.virtual:
        return "splash compares segments for equality, so it has neither virtual tokens nor a prefix"
    if mask.queries.slots is not None or q.shape[1] != k.shape[1]:
        return "splash needs the keys of the queries' own tokens, without a cache"
    if sharded.divides_tokens(jax.sharding.get_abstract_mesh(), q.shape[1]):
        return "splash's masks do not know the part of a row that a device of mesh.context has"
    return ""


def _attend(softcap: float, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    B, T, N, _ = q.shape
    block = min(BLOCK, T + -T % LANES)
    padding = ((0, 0), (0, -T % block))
    size = T + padding[1][1]
    arrays = [jnp.moveaxis(jnp.pad(x, (*padding, (0, 0), (0, 0))), 1, 2) for x in (q, k, v)]
    segments = mask.queries.segments
    if segments is None and not mask.causal and size > T:
        segments = jnp.zeros((1, T), jnp.int32)
    if segments is not None:
        segments = jnp.broadcast_to(jnp.pad(segments, padding, constant_values=FILL), (B, size))

    def kernel(window: int):
        return jax.vmap(_kernel(size, N, block, mask.causal, window, softcap, interpret))

    if mask.local is None:
        out = kernel(mask.window)(*arrays, segments)
    else:
        out = jax.lax.cond(mask.local, kernel(mask.window), kernel(0), *arrays, segments)
    return jnp.moveaxis(out, 2, 1)[:, :T]


@functools.lru_cache(maxsize=64)
def _kernel(
    T: int, heads: int, block: int, causal: bool, window: int, softcap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel `(q [N, T, H], k, v, segments [T] or None) -> [N, T, H]`, whose tables of blocks are constants."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here, as the import takes half a second

    mask: Any = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
    if window:
        mask = splash.LocalMask((T, T), (window - 1, 0 if causal else None), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
    return lambda q, k, v, ids: kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))
