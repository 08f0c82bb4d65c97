"""The causal decoder, driven by its config: Llama, SmolLM2, Mistral, Mixtral, OLMoE, Qwen, GPT-2, Gemma.

Shapes: B rows, T tokens, S keys, D width, V vocabulary, C labels, L layers. Parameter names:
`embed/embedding` `[V, D]`, `layers/attn/{q,k,v,o}/kernel` `[L, in, out]`, `layers/mlp/{gate,up,down}/kernel`,
`layers/{attn_norm,mlp_norm}/scale`, `norm/scale`, `head/kernel` `[D, V]`; `top/...` holds the last `top_layers`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lowrank.core import sharding
from lowrank.core.errors import UserError, plural
from lowrank.models import attention_masks, kv_cache
from lowrank.models.adapter_options import add_sublayer
from lowrank.models.attention import Attention
from lowrank.models.attention_masks import AttentionInputs
from lowrank.models.decoder_config import DecoderConfig
from lowrank.models.embeddings import Embeddings
from lowrank.models.kv_cache import Cache
from lowrank.models.layer_router import apply_with_gates, layer_gates
from lowrank.models.layer_stack import scan_layers, split_by_stack, stack_depths
from lowrank.models.layers import MLP, Head, Norm
from lowrank.models.moe import MoE
from lowrank.models.positions import LayerKind, layer_kinds
from lowrank.models.virtual_tokens import Prefix, Prompt


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache for `batch` rows of `length` tokens and the virtual tokens and the prefix before them."""
    return kv_cache.empty_cache(
        stack_depths(config),
        batch,
        length,
        config.kv_heads,
        config.head_dim,
        dtype or config.dtype,
        config.num_virtual_tokens,
    )


class Block(nn.Module):
    """A layer: attention, then the MLP or beside it, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, h: jax.Array, inputs: AttentionInputs, kind: LayerKind, past: Any, index: Any
    ) -> tuple[jax.Array, Any]:
        """`(h [B, T, D], new entries of the cache or None)`; `kind` selects this layer's part of the inputs.

        With an `index`, `past` and the new entries are keys, values and gates (None without a router).
        """
        c, h = self.config, checkpoint_name(sharding.shard_tokens(h), "input")
        cached_gates = None
        if index is not None:
            *past, cached_gates = past
        gates = layer_gates(self, h, cached_gates)
        attention = Attention(
            c.heads,
            c.kv_heads,
            c.head_dim,
            c.qkv_bias,
            c.o_bias,
            c.fused_qkv,
            c.qk_norm,
            c.wide_qk_norm,
            c.norm_eps,
            c.norm_offset,
            scale=c.attn_scale,
            softcap=c.attn_logit_softcap,
            form=c.attention,
            shift_group=c.shift_group,
            clip=c.clip_qkv,
            by_head=c.qkv_by_head,
            name="attn",
        )
        x = self._pre_norm("attn", h)
        y, new = apply_with_gates(attention, gates, x, inputs.of_layer(kind), past, index)
        before, h = h, self._add("attn", h, x, checkpoint_name(y, "attn"))
        x = self._pre_norm("mlp", before if c.parallel_residual else h)
        h = self._add("mlp", h, x, checkpoint_name(apply_with_gates(self._mlp(), gates, x), "mlp"))
        return h, new and (*new, gates)

    def _add(self, sublayer: str, h: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """The residual stream `h` after `sublayer`, whose input and output are `x` and `y`."""
        c = self.config
        post = self._norm(f"post_{sublayer}_norm") if c.post_norms else lambda y: y
        scaled = lambda y: y * jnp.asarray(c.residual_scale, y.dtype) if c.residual_scale != 1 else y  # noqa: E731
        return add_sublayer(c, sublayer, x, y, lambda y: h + scaled(post(y)))

    def _pre_norm(self, sublayer: str, h: jax.Array) -> jax.Array:
        """The input of `sublayer`, which reads the residual stream `h`."""
        return self._norm(f"{sublayer}_norm")(h) if self.config.pre_norms else h

    def _mlp(self) -> nn.Module:
        c = self.config
        if not c.experts:
            return MLP(c.hidden, c.activation, c.gated, c.mlp_bias, c.fused_gate_up, name="mlp")
        hidden = c.expert_hidden or c.hidden
        options = c.experts_per_token, hidden, c.activation, c.normalize_gates, c.shared_hidden
        routed = (c.routed_width, c.routed_experts, c.routed_per_token, c.routed_scale) if c.routed_width else None
        return MoE(c.experts, *options, routed, name="mlp")

    def _norm(self, name: str) -> Norm:
        return Norm(self.config.norm, self.config.norm_eps, self.config.norm_offset, name=name)


class Decoder(nn.Module):
    """A causal language model, or a classifier when `num_labels` is set.

    `segments` are int32 `[B, T]`: tokens see only their own segment, and 0 is padding, on either side; None means
    that all tokens of a row are one segment. `positions` default to a token's index in its segment.
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Creates the submodules."""
        c = self.config
        table_size = c.max_positions if c.learned_positions else 0
        self.embed = Embeddings(c.vocab_size, c.width, c.dtype, c.embed_scale, table_size)
        if c.num_prompt:
            self.prompt = Prompt(c.num_prompt, c.width, c.embed_scale)
        if c.prefix_length:
            self.prefix = Prefix(c.layers, c.prefix_length, c.kv_heads, c.head_dim)
        if "layers" in stack_depths(c):
            self.layers = scan_layers(Block, c, stack_depths(c)["layers"])
        if "top" in stack_depths(c):
            self.top = scan_layers(Block, c, stack_depths(c)["top"])
        # Its input in the dtype of the activations is saved alone: a residual in float32 would be twice as large.
        self.norm = nn.remat(Norm)(c.norm, c.norm_eps, c.norm_offset)
        # A tied model may be given a head of its own, as an adapter has one.
        self.has_head = bool(c.num_labels or not c.tied or self.has_variable("params", "head"))
        if self.has_head:
            self.head = Head(c.num_labels or c.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits float32 `[B, T, V]` (with a cache: `(logits, cache)`), or `[B, C]` when `num_labels` is set."""
        if self.config.num_labels:
            return self.classify(tokens, segments)
        if cache is None:
            return self.logits(self.features(tokens, positions, segments))
        h_BxTxD, cache = self.features(tokens, positions, segments, cache)
        return self.logits(h_BxTxD), cache

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The head's input, `[B, T, D]`; with a cache `(features, cache)`, and these tokens follow the cached ones.

        Raises UserError when the sequence is longer than the model's positions.
        """
        c = self.config
        T = tokens.shape[1]
        if T + c.num_virtual_tokens > c.max_length:
            virtual = f" and {plural(c.num_virtual_tokens, 'virtual token')}" if c.num_virtual_tokens else ""
            sequence = f"a sequence of {plural(T, 'token')}{virtual}"
            raise UserError(f"{sequence} is longer than the model's {plural(c.max_length, 'position')}: shorten it")
        prefix = split_by_stack(c, self.prefix()) if c.prefix_length else {}
        if cache is not None:
            kv_cache.check_cache(cache, T, c.num_virtual_tokens)
            if prefix and not cache.prompted:
                cache = kv_cache.insert_prefix(cache, prefix, attention_masks.PREFIX_SEGMENT)
        h = self.embed(tokens)
        num_prompt = 0 if cache is not None and cache.prompted else c.num_prompt
        if num_prompt:
            h = self.prompt(h)
        B, length = h.shape[:2]
        positions, inputs, cache = attention_masks.causal_inputs(c, B, length, num_prompt, positions, segments, cache)
        h = sharding.shard_tokens(self.embed.add_positions(h, positions))
        h, new = self._run_stacks(h, inputs, cache, prefix)
        h = sharding.shard_tokens(self.norm(h[:, num_prompt:]))
        return h if cache is None else (h, kv_cache.append_tokens(cache, new))

    def _run_stacks(self, h, inputs, cache, prefix):
        c, new, first = self.config, {}, 0
        for name, depth in stack_depths(c).items():
            kinds = layer_kinds(c, first, depth)
            past = prefix.get(name) if cache is None else kv_cache.read_stack(cache, name)
            index = None if cache is None else cache.index
            h, new[name] = getattr(self, name)(h, inputs, kinds, past, index)
            first += depth
        return h, new

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """The logits of features `[B, T, D]`, float32 `[B, T, V]`."""
        c = self.config
        y = self.head(h_BxTxD) if self.has_head else self.embed.to_logits(h_BxTxD)
        y = y / c.logit_divisor if c.logit_divisor != 1 else y
        return c.final_logit_softcap * jnp.tanh(y / c.final_logit_softcap) if c.final_logit_softcap else y

    def classify(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Label logits, float32 `[B, C]`, from the features of each row's last real token."""
        return self.label_logits(self.pooled(tokens, segments))

    def label_logits(self, pooled_BxD: jax.Array) -> jax.Array:
        """The label logits of pooled features `[B, D]`, float32 `[B, C]`."""
        return self.head(pooled_BxD)

    def pooled(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """The features `[B, D]` of each row's last real token."""
        h_BxTxD = self.features(tokens, segments=segments)
        if segments is None:
            return h_BxTxD[:, -1]
        indices_T = jnp.arange(tokens.shape[1])
        last_B = jnp.max(jnp.where(segments > 0, indices_T[None, :], 0), axis=1)
        return jnp.take_along_axis(h_BxTxD, last_B[:, None, None], axis=1)[:, 0]
