"""The shape of a decoder and how it runs."""

import dataclasses

from lowrank.core.errors import UserError
from lowrank.models import rope
from lowrank.models.adapter_options import AdapterOptions
from lowrank.models.stack import check


@dataclasses.dataclass(frozen=True)
class DecoderConfig(AdapterOptions):
    """The shape of a decoder and how it runs. `tied`: the LM head is the embedding."""

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    tied: bool = False
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to stored scales
    post_norms: bool = False  # norms on what attention and MLP return, too
    qk_norm: bool = False
    wide_qk_norm: bool = False  # one norm over all heads
    clip_qkv: float = 0.0  # the largest size of a query, key or value, after these norms; 0: any
    fused_qkv: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    experts: int = 0  # > 0: a sparse mixture of experts in place of every MLP
    experts_per_token: int = 1
    expert_hidden: int = 0  # 0: hidden
    normalize_gates: bool = False  # the gates of a token's experts sum to 1
    shared_hidden: int = 0  # of an expert that every token sees; 0: there is none
    learned_positions: bool = False  # a table instead of rope
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling | None = None
    window: int = 0  # local layers see this many tokens, themselves included; 0: no layer is local
    local_layers: tuple[bool, ...] = ()  # which layers are local; (): all, if there is a window
    local_rope_theta: float = 0.0  # of local layers, unscaled; 0: as the others
    embed_scale: float = 1.0
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    dtype: str = "float32"  # of activations; norms, softmax and logits are float32
    remat: str = "full"  # what the backward pass recomputes: a key of stack.REMAT
    remat_names: tuple[str, ...] = ()  # of layers.NAMES, for `names` and `offload`; (): those of stack.NAMED
    unroll: int = 1  # layers per step of the scan
    fused_attention: bool = True  # cuDNN's kernel where it fits; else, and with False, XLA's
    shift_group: int = 0  # tokens a group of LongLoRA's shifted sparse attention, without a cache; 0: full attention

    def __post_init__(self) -> None:
        check(self)
        for name in ("qkv_bias", "o_bias", "mlp_bias") if self.biases else ():
            object.__setattr__(self, name, True)
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(f"experts_per_token={self.experts_per_token} is not in 1..{self.experts}")
        if self.shift_group and (self.shift_group < 2 or self.shift_group % 2 or self.num_virtual_tokens):
            with_virtual = " without virtual tokens" if self.num_virtual_tokens else ""
            raise UserError(f"shift_group={self.shift_group} must be a positive even number of tokens{with_virtual}")
        if self.local_layers and len(self.local_layers) != self.layers:
            raise UserError(f"local_layers names {len(self.local_layers)} layers, the model has {self.layers}")

    @property
    def mixed(self) -> bool:
        """Whether local and global layers alternate."""
        return self.window > 0 and not all(self.local_layers)

    @property
    def needs_mask(self) -> bool:
        """Whether attention cannot do with being causal within one window."""
        return self.mixed or self.attn_logit_softcap > 0 or self.prefix_length > 0
