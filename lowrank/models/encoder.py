"""The bidirectional encoder, driven by its config: BERT, RoBERTa, DistilBERT, ModernBERT and those derived from them.

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
from lowrank.models.kv_cache import NOTHING, Past
from lowrank.models.layer_router import apply_with_gates, layer_gates
from lowrank.models.layer_stack import check_model_options, scan_layers, split_by_stack, stack_depths
from lowrank.models.layers import ACTIVATIONS, MLP, Head, Linear, Norm
from lowrank.models.positions import LayerKind, PositionOptions, check_position_options, layer_kinds
from lowrank.models.virtual_tokens import Prefix, Prompt

Segments = jax.Array | None  # int32 `[B, T]`
Types = jax.Array | None  # int32 `[B, T]`
POOLING = ("cls", "mean", "pooler")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(PositionOptions, AdapterOptions):
    """The config of an encoder: its shape, and how it runs."""

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    learned_positions: bool = dataclasses.field(default=True, kw_only=True)
    types: int = 2
    relative_buckets: int = 0  # > 0: disentangled attention, with this many buckets of positions on either side
    relative_distance: int = 0  # the largest distance that these buckets tell apart
    position_offset: int = 0  # the row of the position table that the first token takes
    norm_eps: float = 1e-12
    norm_bias: bool = True
    pre_norm: bool = False  # norms on the inputs of attention and MLP, not on the residual stream after them
    first_norm: bool = True  # of a pre-norm encoder: the first layer's attention reads a normalized input, too
    fused_qkv: bool = False  # one kernel `qkv` instead of three
    attn_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    fused_gate_up: bool = False  # one kernel `gate_up` instead of two
    activation: str = "gelu"
    pooling: str = "cls"  # a row's vector: its first token (cls), its tokens' mean, or BERT's tanh pooler
    dense_head: bool = False  # a layer before the label logits
    head_activation: str = "tanh"  # of this layer
    head_bias: bool = True  # of this layer
    head_norm: bool = False  # whether a norm follows this layer
    dtype: str = "float32"  # the dtype of activations; norms, softmax and logits are float32
    remat: str = "full"  # the backward pass's recomputation: a key of layer_stack.REMAT
    remat_names: tuple[str, ...] = ()  # of layers.SAVEABLE, for `names` and `offload`; (): the policy's default
    unroll: int = 1  # layers per step of the scan
    attention: str = "auto"  # the form of attention without a cache, of kernels.attention.dispatch.FORMS

    def __post_init__(self) -> None:
        check_model_options(self)
        check_position_options(self)
        for name in ("attn_bias", "mlp_bias") if self.biases else ():
            object.__setattr__(self, name, True)
        if self.relative_buckets:
            self._check_relative()
        if self.fused_gate_up and not self.gated:
            raise UserError("fused_gate_up needs a gated MLP")
        if self.pooling not in POOLING:
            raise unknown("pooling", self.pooling, POOLING)

    def _check_relative(self) -> None:
        reasons = {
            f"attention={self.attention}": self.attention not in ("auto", "dense"),
            f"prefix_length={self.prefix_length}": self.prefix_length > 0,
            "fused_qkv": self.fused_qkv,
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"attention to relative positions is computed densely, and does not allow {reason}")

    @property
    def kv_heads(self) -> int:
        """The number of key heads: that of query heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // self.heads


class Block(nn.Module):
    """Attention, then the MLP; the residual stream is normalized after each sum, or for each one's input."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, h: jax.Array, inputs: AttentionInputs, kind: LayerKind, past: Past = NOTHING, slots: None = None
    ) -> tuple[jax.Array, Any]:
        """`(h [B, T, D], None)`; `kind` selects this layer's part of the inputs, and `past` may hold a prefix."""
        c, h = self.config, checkpoint_name(sharding.shard_tokens(h), "input")
        bias, fused = c.attn_bias, c.fused_qkv
        attention = Attention(
            c.heads,
            c.heads,
            c.head_dim,
            bias,
            bias,
            fused,
            form=c.attention,
            relative=(c.relative_buckets, c.relative_distance) if c.relative_buckets else None,
            name="attn",
        )
        gates = layer_gates(self, h)
        x = self._input("attn", h, kind.normed)
        y = checkpoint_name(apply_with_gates(attention, gates, x, inputs.of_layer(kind), past)[0], "attn")
        h = self._add("attn", h, x, y)
        mlp = MLP(c.hidden, c.activation, c.gated, c.mlp_bias, c.fused_gate_up, name="mlp")
        x = self._input("mlp", h)
        return self._add("mlp", h, x, checkpoint_name(apply_with_gates(mlp, gates, x), "mlp")), None

    def _input(self, sublayer: str, h: jax.Array, normed: jax.Array | None = None) -> jax.Array:
        """The input of `sublayer`, which reads the residual stream `h`; `normed` may switch its norm off."""
        if not self.config.pre_norm:
            return h
        x = self._norm(sublayer)(h)
        return x if normed is None else jnp.where(normed, x, h)

    def _add(self, sublayer: str, h: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """The residual stream `h` after `sublayer`, whose input and output are `x` and `y`."""
        norm = (lambda total: total) if self.config.pre_norm else self._norm(sublayer)
        return add_sublayer(self.config, sublayer, x, y, lambda y: norm(h + y))

    def _norm(self, sublayer: str) -> Norm:
        return Norm("layer", self.config.norm_eps, bias=self.config.norm_bias, name=f"{sublayer}_norm")


class DenseHead(nn.Module):
    """`out(act(dense(x)))`, with a norm before `out` if the config has one."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """`[B, D]` -> float32 `[B, C]`."""
        c = self.config
        h_BxD = ACTIVATIONS[c.head_activation](Linear(x_BxD.shape[-1], c.head_bias, name="dense")(x_BxD))
        h_BxD = Norm("layer", c.norm_eps, bias=c.norm_bias, name="norm")(h_BxD) if c.head_norm else h_BxD
        return Head(c.num_labels, True, name="out")(h_BxD)


class Encoder(nn.Module):
    """Features of every token, one vector per row (`pooled`), or label logits when `num_labels` is set.

    `segments` are int32 `[B, T]`: tokens see only their own segment, and 0 is padding; None: no padding.
    """

    config: EncoderConfig

    def setup(self) -> None:
        """Creates the submodules."""
        c = self.config
        table_size = c.max_positions + c.position_offset if c.learned_positions else 0
        tables, relative = (table_size, c.types), 2 * c.relative_buckets
        self.embed = Embeddings(c.vocab_size, c.width, c.dtype, 1.0, *tables, c.norm_eps, c.norm_bias, relative)
        if c.num_prompt:
            self.prompt = Prompt(c.num_prompt, c.width)
        if c.prefix_length:
            self.prefix = Prefix(c.layers, c.prefix_length, c.kv_heads, c.head_dim)
        if "layers" in stack_depths(c):
            self.layers = scan_layers(Block, c, stack_depths(c)["layers"])
        if "top" in stack_depths(c):
            self.top = scan_layers(Block, c, stack_depths(c)["top"])
        if c.pre_norm:
            self.norm = nn.remat(Norm)("layer", c.norm_eps, bias=c.norm_bias)
        if c.pooling == "pooler":
            self.pooler = Linear(c.width, True)
        if c.num_labels:
            self.head = DenseHead(c) if c.dense_head else Head(c.num_labels, True)

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
        if length + c.prefix_length > c.max_length:
            virtual = f" and {plural(c.num_virtual_tokens, 'virtual token')}" if c.num_virtual_tokens else ""
            sequence = f"a sequence of {plural(tokens.shape[1], 'token')}{virtual}"
            raise UserError(f"{sequence} is longer than the model's {plural(c.max_length, 'position')}: shorten it")
        h = self.embed(tokens)
        if c.num_prompt:
            h = self.prompt(h)
            types = None if types is None else jnp.pad(types, ((0, 0), (c.num_prompt, 0)))
        positions_BxT, inputs = attention_masks.bidirectional_inputs(c, segments, length)
        h = sharding.shard_tokens(self.embed.add_positions(h, positions_BxT + c.position_offset, types))
        prefix = split_by_stack(c, self.prefix()) if c.prefix_length else {}
        if c.relative_buckets:
            inputs = inputs._replace(relative=self.embed.relative_positions())
        h = self._run_stacks(h, inputs, prefix)[0][:, c.num_prompt :]
        return sharding.shard_tokens(self.norm(h) if c.pre_norm else h)

    def _run_stacks(self, h, inputs, prefix):
        first = 0
        for name, depth in stack_depths(self.config).items():
            kinds = layer_kinds(self.config, first, depth)
            h, _ = getattr(self, name)(h, inputs, kinds, Past(prefix.get(name)), None)
            first += depth
        return h, {}  # as the decoder's, whose second value is for the cache

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
