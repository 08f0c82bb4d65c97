"""The bidirectional encoder, driven by its config: BERT, RoBERTa and the sentence encoders derived from them.

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
from lowrank.core.errors import UserError, plural, unknown
from lowrank.models import attention_masks
from lowrank.models.adapter_options import AdapterOptions, add_sublayer
from lowrank.models.attention import Attention
from lowrank.models.attention_masks import AttentionInputs
from lowrank.models.embeddings import Embeddings
from lowrank.models.layer_router import apply_with_gates, layer_gates
from lowrank.models.layer_stack import check_model_options, scan_layers, split_by_stack, stack_depths
from lowrank.models.layers import MLP, Head, Linear, Norm
from lowrank.models.virtual_tokens import Prefix, Prompt

Segments = jax.Array | None  # int32 `[B, T]`
Types = jax.Array | None  # int32 `[B, T]`
POOLING = ("cls", "mean", "pooler")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(AdapterOptions):
    """The config of an encoder: its shape, and how it runs."""

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
    pooling: str = "cls"  # a row's vector: its first token (cls), its tokens' mean, or BERT's tanh pooler
    dense_head: bool = False  # a tanh layer before the label logits
    dtype: str = "float32"  # the dtype of activations; norms, softmax and logits are float32
    remat: str = "full"  # the backward pass's recomputation: a key of layer_stack.REMAT
    remat_names: tuple[str, ...] = ()  # of layers.SAVEABLE, for `names` and `offload`; (): the policy's default
    unroll: int = 1  # layers per step of the scan
    attention: str = "auto"  # the form of attention without a cache, of kernels.attention.dispatch.FORMS

    def __post_init__(self) -> None:
        check_model_options(self)
        if self.pooling not in POOLING:
            raise unknown("pooling", self.pooling, POOLING)

    @property
    def kv_heads(self) -> int:
        """The number of key heads: that of query heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads


class Block(nn.Module):
    """A post-norm layer: attention, then the MLP; the residual stream is normalized after each sum."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, h: jax.Array, inputs: AttentionInputs, local: Any, past: Any, index: Any
    ) -> tuple[jax.Array, Any]:
        """`(h [B, T, D], None)`; `past` is a prefix or None."""
        c, h = self.config, checkpoint_name(sharding.shard_tokens(h), "input")
        attention = Attention(c.heads, c.heads, c.head_dim, qkv_bias=True, o_bias=True, form=c.attention, name="attn")
        gates = layer_gates(self, h)
        y = checkpoint_name(apply_with_gates(attention, gates, h, inputs, past)[0], "attn")
        h = self._add("attn", h, y)
        mlp = MLP(c.hidden, c.activation, bias=True, name="mlp")
        return self._add("mlp", h, checkpoint_name(apply_with_gates(mlp, gates, h), "mlp")), None

    def _add(self, sublayer: str, h: jax.Array, y: jax.Array) -> jax.Array:
        """The residual stream after `sublayer`, which reads `h` and returns `y`."""
        norm = Norm("layer", self.config.norm_eps, name=f"{sublayer}_norm")
        return add_sublayer(self.config, sublayer, h, y, lambda y: norm(h + y))


class DenseHead(nn.Module):
    """`out(tanh(dense(x)))`."""

    labels: int

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """`[B, D]` -> float32 `[B, C]`."""
        return Head(self.labels, True, name="out")(jnp.tanh(Linear(x_BxD.shape[-1], True, name="dense")(x_BxD)))


class Encoder(nn.Module):
    """Features of every token, one vector per row (`pooled`), or label logits when `num_labels` is set.

    `segments` are int32 `[B, T]`: tokens see only their own segment, and 0 is padding; None: no padding.
    """

    config: EncoderConfig

    def setup(self) -> None:
        """Creates the submodules."""
        c = self.config
        table_size = c.max_positions + c.position_offset
        self.embed = Embeddings(c.vocab_size, c.width, c.dtype, 1.0, table_size, c.types, c.norm_eps)
        if c.num_prompt:
            self.prompt = Prompt(c.num_prompt, c.width)
        if c.prefix_length:
            self.prefix = Prefix(c.layers, c.prefix_length, c.kv_heads, c.head_dim)
        if "layers" in stack_depths(c):
            self.layers = scan_layers(Block, c, stack_depths(c)["layers"])
        if "top" in stack_depths(c):
            self.top = scan_layers(Block, c, stack_depths(c)["top"])
        if c.pooling == "pooler":
            self.pooler = Linear(c.width, True)
        if c.num_labels:
            self.head = DenseHead(c.num_labels) if c.dense_head else Head(c.num_labels, True)

    def __call__(self, tokens: jax.Array, segments: Segments = None, types: jax.Array | None = None) -> jax.Array:
        """Label logits float32 `[B, C]` when `num_labels` is set, else features `[B, T, D]`."""
        if self.config.num_labels:
            return self.classify(tokens, segments, types)
        if self.is_initializing():
            self.pooled(tokens, segments, types)
        return self.features(tokens, segments, types)

    def features(self, tokens: jax.Array, segments: Segments = None, types: jax.Array | None = None) -> jax.Array:
        """`[B, T, D]`. Raises UserError when the sequence is longer than the model's positions."""
        c = self.config
        length = tokens.shape[1] + c.num_prompt
        if length + c.prefix_length > c.max_positions:
            virtual = f" and {plural(c.num_virtual_tokens, 'virtual token')}" if c.num_virtual_tokens else ""
            sequence = f"a sequence of {plural(tokens.shape[1], 'token')}{virtual}"
            raise UserError(f"{sequence} is longer than the model's {plural(c.max_positions, 'position')}: shorten it")
        h = self.embed(tokens)
        if c.num_prompt:
            h = self.prompt(h)
            types = None if types is None else jnp.pad(types, ((0, 0), (c.num_prompt, 0)))
        positions_BxT, inputs = attention_masks.bidirectional_inputs(segments, c.num_prompt, length, c.prefix_length)
        h = sharding.shard_tokens(self.embed.add_positions(h, positions_BxT + c.position_offset, types))
        prefix = split_by_stack(c, self.prefix()) if c.prefix_length else {}
        return sharding.shard_tokens(self._run_stacks(h, inputs, prefix)[:, c.num_prompt :])

    def _run_stacks(self, h, inputs, prefix):
        for name in stack_depths(self.config):
            h, _ = getattr(self, name)(h, inputs, None, prefix.get(name), None)
        return h

    def pooled(self, tokens: jax.Array, segments: Segments = None, types: Types = None) -> jax.Array:
        """The vector `[B, D]` of each row, by the config's `pooling`."""
        h_BxTxD = self.features(tokens, segments, types)
        if self.config.pooling == "mean":
            real_BxT = jnp.ones_like(tokens) if segments is None else segments > 0
            real_BxTx1 = real_BxT[..., None].astype(jnp.float32)
            total_BxD = jnp.sum(h_BxTxD.astype(jnp.float32) * real_BxTx1, axis=1)
            return (total_BxD / jnp.maximum(jnp.sum(real_BxTx1, axis=1), 1)).astype(h_BxTxD.dtype)
        first_B = jnp.zeros(len(tokens), jnp.int32) if segments is None else jnp.argmax(segments > 0, axis=1)
        first_BxD = jnp.take_along_axis(h_BxTxD, first_B[:, None, None], axis=1)[:, 0]
        return jnp.tanh(self.pooler(first_BxD)) if self.config.pooling == "pooler" else first_BxD

    def classify(self, tokens: jax.Array, segments: Segments = None, types: jax.Array | None = None) -> jax.Array:
        """Label logits, float32 `[B, C]`."""
        return self.label_logits(self.pooled(tokens, segments, types))

    def label_logits(self, pooled_BxD: jax.Array) -> jax.Array:
        """The label logits of pooled features `[B, D]`, float32 `[B, C]`."""
        return self.head(pooled_BxD)
