"""One bidirectional encoder, driven by its config: BERT, RoBERTa and the sentence encoders made from them.

Shapes: B rows, T tokens, D width, C labels. Parameter names: `embed/{embedding,positions,types}`, `embed/norm/...`,
`layers/attn/{q,k,v,o}/{kernel,bias}` `[L, ...]`, `layers/mlp/{up,down}/...`, `layers/{attn_norm,mlp_norm}/...`,
`pooler/{kernel,bias}`, `head/{kernel,bias}` or `head/{dense,out}/{kernel,bias}`; `top/...` the last `top_layers`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lowrank.core import sharding
from lowrank.core.errors import UserError, unknown
from lowrank.models import attention_masks, routing
from lowrank.models.adapter_options import AdapterOptions, add_adapter
from lowrank.models.attention import Attention
from lowrank.models.attention_masks import AttentionInputs
from lowrank.models.embed import Embed, Prompt
from lowrank.models.layers import MLP, Linear, Norm
from lowrank.models.prefix import Prefix
from lowrank.models.stack import by_stack, check, depths, stack

Opt = jax.Array | None
POOLING = ("cls", "mean", "pooler")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(AdapterOptions):
    """The shape of an encoder and how it runs."""

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    types: int = 2
    position_offset: int = 0  # the row of the position table that the first token takes
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooling: str = "cls"  # what stands for a row: its first token, the mean of its tokens, or BERT's tanh pooler
    dense_head: bool = False  # a tanh layer before the label logits
    dtype: str = "float32"  # of activations; norms, softmax and logits are float32
    remat: str = "full"  # what the backward pass recomputes: a key of stack.REMAT
    remat_names: tuple[str, ...] = ()  # of layers.NAMES, for `names` and `offload`; (): those of stack.NAMED
    unroll: int = 1  # layers per step of the scan
    fused_attention: bool = True  # cuDNN's kernel where it fits; else, and with False, XLA's

    def __post_init__(self) -> None:
        check(self)
        if self.pooling not in POOLING:
            raise unknown("pooling", self.pooling, POOLING)

    @property
    def kv_heads(self) -> int:
        """As many as query heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads


class Block(nn.Module):
    """A post-norm layer: attention, then MLP, the stream normalised after each is added."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, h: jax.Array, view: AttentionInputs, local: Any, past: Any, index: Any) -> tuple[jax.Array, Any]:
        """`(h [B, T, D], None)`; `past` is a prefix or None."""
        c, h = self.config, checkpoint_name(sharding.shard_batch_axis(h), "input")
        options = {"qkv_bias": True, "o_bias": True, "fused": c.fused_attention}
        attention, gates = Attention(c.heads, c.heads, c.head_dim, **options, name="attn"), routing.gates(self, h)
        y = checkpoint_name(routing.call(attention, gates, h, view, past)[0], "attn")
        h = Norm("layer", c.norm_eps, name="attn_norm")(h + add_adapter(c, "attn", h, y))
        y = checkpoint_name(routing.call(MLP(c.hidden, c.activation, bias=True, name="mlp"), gates, h), "mlp")
        y = add_adapter(c, "mlp", h, y)
        return Norm("layer", c.norm_eps, name="mlp_norm")(h + y), None


class DenseHead(nn.Module):
    """`out(tanh(dense(x)))`."""

    labels: int

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """`[B, D] -> [B, C]`."""
        return Linear(self.labels, True, name="out")(jnp.tanh(Linear(x_BxD.shape[-1], True, name="dense")(x_BxD)))


class Encoder(nn.Module):
    """Features of every token, one vector a row (`pooled`), or label logits when `num_labels` is set.

    `segments` are int32 `[B, T]`: tokens see their own segment only, and 0 is padding; None: no padding.
    """

    config: EncoderConfig

    def setup(self) -> None:
        """Names the parts."""
        c = self.config
        places = c.max_positions + c.position_offset
        self.embed = Embed(c.vocab_size, c.width, c.dtype, 1.0, places, c.types, c.norm_eps)
        if c.num_prompt:
            self.prompt = Prompt(c.num_prompt, c.width)
        if c.prefix_length:
            self.prefix = Prefix(c.layers, c.prefix_length, c.kv_heads, c.head_dim)
        if "layers" in depths(c):
            self.layers = stack(Block, c, depths(c)["layers"])
        if "top" in depths(c):
            self.top = stack(Block, c, depths(c)["top"])
        if c.pooling == "pooler":
            self.pooler = Linear(c.width, True)
        if c.num_labels:
            self.head = DenseHead(c.num_labels) if c.dense_head else Linear(c.num_labels, True)

    def __call__(self, tokens: jax.Array, segments: Opt = None, types: Opt = None) -> jax.Array:
        """Label logits float32 `[B, C]` when `num_labels` is set, else features `[B, T, D]`."""
        if self.config.num_labels:
            return self.classify(tokens, segments, types)
        if self.is_initializing():
            self.pooled(tokens, segments, types)
        return self.features(tokens, segments, types)

    def features(self, tokens: jax.Array, segments: Opt = None, types: Opt = None) -> jax.Array:
        """`[B, T, D]`. Raises UserError when the sequence is longer than the model's positions."""
        c = self.config
        length = tokens.shape[1] + c.num_prompt
        whole = length + c.prefix_length
        if whole > c.max_positions:
            virtual = f", {c.num_virtual_tokens} of them virtual," if c.num_virtual_tokens else ""
            raise UserError(f"a sequence of {whole} tokens{virtual} exceeds the model's {c.max_positions} positions")
        h = self.embed(tokens)
        if c.num_prompt:
            h = self.prompt(h)
            types = None if types is None else jnp.pad(types, ((0, 0), (c.num_prompt, 0)))
        positions_BxT, view = attention_masks.bidirectional(segments, c.num_prompt, length, c.prefix_length)
        h = sharding.shard_batch_axis(self.embed.place(h, positions_BxT + c.position_offset, types))
        prefix = by_stack(c, self.prefix()) if c.prefix_length else {}
        return sharding.shard_batch_axis(self._run(h, view, prefix)[:, c.num_prompt :])

    def _run(self, h, view, prefix):
        for name in depths(self.config):
            h, _ = getattr(self, name)(h, view, None, prefix.get(name), None)
        return h

    def pooled(self, tokens: jax.Array, segments: Opt = None, types: Opt = None) -> jax.Array:
        """`[B, D]`: what stands for a row, by the config's `pooling`."""
        h_BxTxD = self.features(tokens, segments, types)
        if self.config.pooling == "mean":
            real_BxT = jnp.ones_like(tokens) if segments is None else segments > 0
            real_BxTx1 = real_BxT[..., None].astype(jnp.float32)
            total_BxD = jnp.sum(h_BxTxD.astype(jnp.float32) * real_BxTx1, axis=1)
            return (total_BxD / jnp.maximum(jnp.sum(real_BxTx1, axis=1), 1)).astype(h_BxTxD.dtype)
        first_B = jnp.zeros(len(tokens), jnp.int32) if segments is None else jnp.argmax(segments > 0, axis=1)
        first_BxD = jnp.take_along_axis(h_BxTxD, first_B[:, None, None], axis=1)[:, 0]
        return jnp.tanh(self.pooler(first_BxD)) if self.config.pooling == "pooler" else first_BxD

    def classify(self, tokens: jax.Array, segments: Opt = None, types: Opt = None) -> jax.Array:
        """Label logits, float32 `[B, C]`."""
        return self.labels(self.pooled(tokens, segments, types))

    def labels(self, pooled_BxD: jax.Array) -> jax.Array:
        """What stands for a row to label logits, float32 `[B, C]`."""
        return self.head(pooled_BxD).astype(jnp.float32)
