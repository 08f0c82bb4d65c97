"""The causal decoder, driven by its config: Llama, SmolLM2, Mistral, Mixtral, OLMoE, Qwen, GPT-2, Gemma.

Shapes: B rows, T tokens, S keys, D width, V vocabulary, C labels, L layers. Parameter names:
`embed/embedding` `[V, D]`, `layers/attn/{q,k,v,o}/kernel` `[L, in, out]`, `layers/mlp/{gate,up,down}/kernel`,
`layers/{attn_norm,mlp_norm}/scale`, `norm/scale`, `head/kernel` `[D, V]`; `top/...` holds the last `top_layers`.
"""

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
from lowrank.models.kv_cache import NOTHING, Cache, Entries, Past, Slots
from lowrank.models.layer_router import apply_with_gates, layer_gates
from lowrank.models.layer_stack import scan_layers, split_by_stack, stack_depths
from lowrank.models.layers import MLP, Head, Norm
from lowrank.models.moe import MoE
from lowrank.models.positions import LayerKind, layer_kinds
from lowrank.models.virtual_tokens import Prefix, Prompt


def init_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of `slots` tokens, virtual ones among them."""
    return kv_cache.empty_cache(stack_depths(config), batch, slots, config.kv_heads, config.head_dim, config.dtype)


class Block(nn.Module):
    """A layer: attention, then the MLP or beside it, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        inputs: AttentionInputs,
        kind: LayerKind,
        past: Past = NOTHING,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, Entries | None]:
        """`(h [B, T, D], new entries of the cache or None)`; `kind` selects this layer's part of the inputs."""
        c, h = self.config, checkpoint_name(sharding.shard_tokens(h), "input")
        gates = layer_gates(self, h, past.gates)
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
            prefix_length=c.prefix_length,
            clip=c.clip_qkv,
            by_head=c.qkv_by_head,
            name="attn",
        )
        x = self._pre_norm("attn", h)
        y, new = apply_with_gates(attention, gates, x, inputs.of_layer(kind), past, slots)
        before, h = h, self._add("attn", h, x, checkpoint_name(y, "attn"))
        x = self._pre_norm("mlp", before if c.parallel_residual else h)
        h = self._add("mlp", h, x, checkpoint_name(apply_with_gates(self._mlp(), gates, x), "mlp"))
        return h, Entries(new[0], new[1], gates) if new else None

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
    ) -> jax.Array:
        """Logits float32 `[B, T, V]`, or `[B, C]` when `num_labels` is set."""
        if self.config.num_labels:
            return self.classify(tokens, segments)
        return self.logits(self.features(tokens, positions, segments))

    def features(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """The head's input, `[B, T, D]`. Raises UserError when the sequence is longer than the model's positions."""
        return self._first_tokens(tokens, positions, segments, None)[0]

    def prefill(self, tokens: jax.Array, slots: int = 0) -> tuple[jax.Array, dict[str, Entries]]:
        """`(features [B, T, D], entries)` of the first tokens of rows, for `kv_cache.insert_rows`.

        The entries of virtual tokens come first. What follows a row's last token changes nothing before it. `slots` is
        the length of the cache, by which a rope of two lengths chooses (0: that of the tokens).
        """
        return self._first_tokens(tokens, None, None, Slots(), slots)

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`(features [B, T, D], cache)` of tokens that follow those in the cache."""
        c = self.config
        positions, inputs = attention_masks.cached_inputs(c, cache.index_B, tokens.shape[1], cache.slots)
        h = sharding.shard_tokens(self.embed.add_positions(self.embed(tokens), positions))
        h, entries = self._run_stacks(h, inputs, {name: kv_cache.read_stack(cache, name) for name in stack_depths(c)})
        return sharding.shard_tokens(self.norm(h)), kv_cache.append_tokens(cache, entries)

    def _first_tokens(self, tokens, positions, segments, slots, length=0):
        c = self.config
        T = tokens.shape[1]
        if T + c.num_virtual_tokens > c.max_length:
            virtual = f" and {plural(c.num_virtual_tokens, 'virtual token')}" if c.num_virtual_tokens else ""
            sequence = f"a sequence of {plural(T, 'token')}{virtual}"
            raise UserError(f"{sequence} is longer than the model's {plural(c.max_length, 'position')}: shorten it")
        prefix = split_by_stack(c, self.prefix()) if c.prefix_length else {}
        h = self.embed(tokens)
        if c.num_prompt:
            h = self.prompt(h)
        positions, inputs = attention_masks.causal_inputs(c, h.shape[1], c.num_prompt, positions, segments, length)
        h = sharding.shard_tokens(self.embed.add_positions(h, positions))
        h, entries = self._run_stacks(h, inputs, {name: (slots, Past(prefix.get(name))) for name in stack_depths(c)})
        return sharding.shard_tokens(self.norm(h[:, c.num_prompt :])), entries

    def _run_stacks(self, h, inputs, before):
        """`before` has, for each stack, the slots and what each of its layers has of its own."""
        c, new, first = self.config, {}, 0
        for name, depth in stack_depths(c).items():
            slots, past = before[name]
            h, new[name] = getattr(self, name)(h, inputs, layer_kinds(c, first, depth), past, slots)
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
