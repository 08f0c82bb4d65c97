"""The form of attention that the layers of a model take, for the log of a run and before it starts.

Shapes: B rows, T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import plural
from lowrank.kernels.attention import dispatch
from lowrank.kernels.attention.mask import Mask
from lowrank.models import attention_masks
from lowrank.models.decoder_config import DecoderConfig
from lowrank.models.encoder import EncoderConfig
from lowrank.models.shifted_sparse_attention import attend_shifted


def describe_attention(config: DecoderConfig | EncoderConfig, device: Any, rows: int, length: int) -> str:
    """One line: the form that every layer takes for rows of `length` tokens on a device like this.

    Raises UserError if the config names a form that cannot run.
    """
    chosen: set[str] = set()
    platform, softcap = dispatch.platform_of(device), getattr(config, "attn_logit_softcap", 0.0)

    def note(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        chosen.add(dispatch.choose(platform, q, k, mask, softcap, config.attention))
        return q

    def layer(tokens_BxT: jax.Array) -> jax.Array:
        mask, T = _mask(config, tokens_BxT), length + config.num_prompt
        q, k = (
            jnp.zeros((rows, size, heads, config.head_dim), config.dtype)
            for size, heads in ((T, config.heads), (T + config.prefix_length, config.kv_heads))
        )
        group = getattr(config, "shift_group", 0)
        return attend_shifted(note, q, k, k, mask, group) if group else note(q, k, k, mask)

    jax.eval_shape(layer, jax.ShapeDtypeStruct((rows, length), jnp.int32))
    of = f"in {plural(config.layers, 'layer')}, for rows of {plural(length, 'token')}"
    return f"attention on {device.device_kind}: {', '.join(sorted(chosen))} {of}"


def _mask(config: DecoderConfig | EncoderConfig, tokens_BxT: jax.Array) -> Mask:
    """The mask of rows with segments and positions."""
    B, T = tokens_BxT.shape
    T += config.num_prompt
    if isinstance(config, EncoderConfig):
        return attention_masks.bidirectional_inputs(tokens_BxT, config.num_prompt, T, config.prefix_length)[1].mask
    inputs = attention_masks.causal_inputs(config, B, T, config.num_prompt, tokens_BxT, tokens_BxT, None)[1]
    return inputs.mask
