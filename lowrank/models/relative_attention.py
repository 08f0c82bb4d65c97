"""Disentangled attention: scores of contents, of content to position, and of position to content.

It is that of DeBERTa (He et al. 2021, arXiv:2006.03654) as DeBERTa-v3 has it: relative positions in buckets, which grow
with the distance, and the kernels of queries and keys for their embeddings, too.

Shapes: B rows, T tokens, N heads, H head width, R = 2 * buckets relative positions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.kernels.attention.mask import Mask


def bucket_indices(length: int, buckets: int, distance: int) -> np.ndarray:
    """The index in `[0, 2 * buckets)` of each query's position minus each key's, int32 `[T, T]`.

    Distances up to half of `buckets` have a bucket each; those up to `distance` share the rest on a logarithmic scale.
    It is computed in float32, as transformers does.
    """
    relative, middle = np.subtract.outer(np.arange(length), np.arange(length)), buckets // 2
    far = np.maximum(np.abs(relative), middle).astype(np.float32)
    logs = np.log(far / np.float32(middle)) / np.log(np.float32((distance - 1) / middle))
    log_buckets = np.ceil(logs * np.float32(middle - 1)) + middle
    bucketed = np.where(np.abs(relative) <= middle, relative, log_buckets * np.sign(relative))
    return np.clip(bucketed + buckets, 0, 2 * buckets - 1).astype(np.int32)


def attend_relative(
    q_BxTxNxH: jax.Array,
    k_BxTxNxH: jax.Array,
    v_BxTxNxH: jax.Array,
    positions: tuple[jax.Array, jax.Array],
    mask: Mask,
    buckets: int,
    distance: int,
) -> jax.Array:
    """`softmax((q k + q pos_k + pos_q k) / sqrt(3 H)) v`, `[B, T, N, H]`, with the softmax in float32.

    `positions` are the queries and keys `[1, R, N, H]` of relative positions.
    """
    T, H = q_BxTxNxH.shape[1], q_BxTxNxH.shape[3]
    index_1x1xTxT = jnp.asarray(bucket_indices(T, buckets, distance))[None, None]
    pos_q, pos_k = (x[0] for x in positions)
    product = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)  # noqa: E731
    to_position = product("BTNH,RNH->BNTR", q_BxTxNxH, pos_k)
    to_content = product("BSNH,RNH->BNSR", k_BxTxNxH, pos_q)
    scores = product("BTNH,BSNH->BNTS", q_BxTxNxH, k_BxTxNxH)
    scores += jnp.take_along_axis(to_position, index_1x1xTxT, axis=-1)
    scores += jnp.take_along_axis(to_content, index_1x1xTxT.swapaxes(2, 3), axis=-1).swapaxes(2, 3)
    seen = mask.expand(T, T)[:, None]
    probs = jax.nn.softmax(jnp.where(seen, scores * (3 * H) ** -0.5, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", probs.astype(v_BxTxNxH.dtype), v_BxTxNxH)
