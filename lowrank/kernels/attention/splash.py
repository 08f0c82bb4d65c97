"""Attention by jax's splash kernel for TPUs, which keeps scores on the chip and skips blocks that no query sees.

The mask of causal attention and of a window is static, and segments are compared for equality only. So a window is a
distance of slots: within a segment, tokens lie side by side and positions count up by one. Rows are padded to whole
blocks by tokens of a segment of their own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels.attention import context, sharded
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
    T, mesh = q.shape[1], jax.sharding.get_abstract_mesh()
    if mask.virtual:
        return "splash compares segments for equality, so it has neither virtual tokens nor a prefix"
    if mask.queries.slots is not None or k.shape[1] != T:
        return "splash needs the keys of the queries' own tokens, without a cache"
    if sharded.divides_tokens(mesh, T) and T // mesh.shape[context.AXIS] % LANES:
        return f"splash needs a multiple of {LANES} tokens on each device of mesh.context"
    return ""


def _attend(softcap: float, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """Attention on one device, whose queries may be a part of the row."""
    parts = k.shape[1] // q.shape[1]
    block = min(BLOCK, q.shape[1] + -q.shape[1] % LANES) if parts == 1 else math.gcd(BLOCK, q.shape[1])
    padded = [_pad(x, block, 0) for x in (q, k, v)]
    segments: tuple[Any, Any] = mask.queries.segments, mask.keys.segments
    if segments[0] is None and not mask.causal and padded[0].shape != q.shape:
        segments = (jnp.zeros((1, q.shape[1]), jnp.int32),) * 2
    if segments[0] is not None:
        rows = [jnp.broadcast_to(x, (len(q), x.shape[1])) for x in segments]
        segments = _pad(rows[0], block, FILL), _pad(rows[1], block, FILL)

    def kernel(window: int) -> Callable[..., jax.Array]:
        one = _kernel(padded[1].shape[1], q.shape[2], block, parts, mask.causal, window, softcap, interpret)
        return jax.vmap(one)

    arrays = *(jnp.moveaxis(x, 1, 2) for x in padded), segments
    if mask.local is None:
        out = kernel(mask.window)(*arrays)
    else:
        out = jax.lax.cond(mask.local, kernel(mask.window), kernel(0), *arrays)
    return jnp.moveaxis(out, 2, 1)[:, : q.shape[1]]


def _pad(x: jax.Array, block: int, fill: int) -> jax.Array:
    """`[B, T, ...]` with T rounded up to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)), constant_values=fill)


@functools.lru_cache(maxsize=64)
def _kernel(
    S: int, heads: int, block: int, parts: int, causal: bool, window: int, softcap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel `(q [N, T, H], k, v [K, S, H], segments of both) -> [N, T, H]`; its tables of blocks are constants.

    With several parts, the T = S / parts queries are those that `context.balance` gives this device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here, as the import takes half a second

    from lowrank.kernels.attention import splash_masks

    mask: Any = splash_masks.CausalMask((S, S)) if causal else splash.FullMask((S, S))
    if window:
        mask = splash_masks.LocalMask((S, S), (window - 1, 0 if causal else window - 1), 0)
    if causal and parts > 1:
        mask.q_sequence = context.balanced_slots(S, parts)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    with jax.ensure_compile_time_eval():
        whole = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: tuple[Any, Any]) -> jax.Array:
        kernel = whole if parts == 1 else jax.tree.map(lambda x: context.own_part(x, x.ndim > 1), whole)
        return kernel(q, k, v, None if segments[0] is None else splash.SegmentIds(*segments))

    return attend
