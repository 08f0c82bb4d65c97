"""The form of attention that the layers of a model take, for the log of a run and before it starts.

Shapes: B rows, T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural
from lowrank.kernels.attention import context, dispatch, sharded
from lowrank.kernels.attention.mask import Mask
from lowrank.models import attention_masks
from lowrank.models.decoder_config import DecoderConfig
from lowrank.models.encoder import EncoderConfig
from lowrank.models.shifted_sparse_attention import attend_shifted


def describe_attention(config: DecoderConfig | EncoderConfig, device: Any, rows: int, length: int) -> str:
    """One line: the form that every layer takes for rows of `length` tokens on a device like this.

    Raises UserError if the config names a form that cannot run, or if the tokens do not divide over the mesh of
    `jax.sharding.use_abstract_mesh`.
    """
    _check_context(length, config.num_prompt)
    chosen: set[str] = set()
    platform, softcap = dispatch.platform_of(device), getattr(config, "attn_logit_softcap", 0.0)

    def note(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        form = "dense" if getattr(config, "relative_buckets", 0) else config.attention
        chosen.add(dispatch.choose(platform, q, k, mask, softcap, form))
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


def _check_context(length: int, num_prompt: int) -> None:
    """Raises UserError if the mesh's axis `context` does not divide a row into its chunks."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get(context.AXIS, 1) if not mesh.empty else 1
    total, chunks = length + num_prompt, 2 * size
    if size > 1 and not sharded.divides_tokens(mesh, total):
        virtual = f" and {plural(num_prompt, 'virtual token')}" if num_prompt else ""
        fits = total + -total % chunks - num_prompt
        raise UserError(
            f"a row of {plural(length, 'token')}{virtual} does not divide into {chunks} chunks, two for each device of "
            f"mesh.context={size}: set data.seq_len to {fits}, or choose another mesh"
        )


def _mask(config: DecoderConfig | EncoderConfig, tokens_BxT: jax.Array) -> Mask:
    """The mask of rows with segments and positions."""
    T = tokens_BxT.shape[1] + config.num_prompt
    if isinstance(config, EncoderConfig):
        return attention_masks.bidirectional_inputs(config, tokens_BxT, T)[1].mask
    inputs = attention_masks.causal_inputs(config, T, config.num_prompt, tokens_BxT, tokens_BxT)[1]
    return inputs.mask
