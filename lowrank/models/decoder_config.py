"""The config of a decoder: its shape, and how it runs."""

import dataclasses

from lowrank.core.errors import UserError
from lowrank.models.adapter_options import AdapterOptions
from lowrank.models.layer_stack import check_model_options
from lowrank.models.positions import PositionOptions, check_position_options


@dataclasses.dataclass(frozen=True)
class DecoderConfig(PositionOptions, AdapterOptions):
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
    pre_norms: bool = True  # norms on the inputs of attention and MLP
    post_norms: bool = False  # norms on the outputs of attention and MLP
    parallel_residual: bool = False  # attention and MLP read the same residual stream
    residual_scale: float = 1.0  # the factor of the outputs of attention and MLP
    qk_norm: bool = False
    wide_qk_norm: bool = False  # one norm over all heads, not one per head
    clip_qkv: float = 0.0  # > 0: queries, keys and values are clipped to this size after these norms
    fused_qkv: bool = False  # one kernel `qkv` instead of three
    qkv_by_head: bool = False  # its outputs are each head's query, key and value in turn
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    fused_gate_up: bool = False  # one kernel `gate_up` instead of two
    activation: str = "silu"
    experts: int = 0  # > 0: a sparse mixture of experts in place of every MLP
    experts_per_token: int = 1
    expert_hidden: int = 0  # 0: hidden
    normalize_gates: bool = False  # the gates of a token's experts sum to 1
    shared_hidden: int = 0  # > 0: the hidden width of an expert that every token uses
    embed_scale: float = 1.0
    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    logit_divisor: float = 1.0  # logits are divided by it
    dtype: str = "float32"  # the dtype of activations; norms, softmax and logits are float32
    remat: str = "full"  # the backward pass's recomputation: a key of layer_stack.REMAT
    remat_names: tuple[str, ...] = ()  # of layers.SAVEABLE, for `names` and `offload`; (): the policy's default
    unroll: int = 1  # layers per step of the scan
    attention: str = "auto"  # the form of attention without a cache, of kernels.attention.dispatch.FORMS
    shift_group: int = 0  # tokens per group of LongLoRA's shifted sparse attention; 0: full attention

    def __post_init__(self) -> None:
        check_model_options(self)
        for name in ("qkv_bias", "o_bias", "mlp_bias") if self.biases else ():
            object.__setattr__(self, name, True)
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}, which they share")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"experts_per_token={self.experts_per_token} is not in 1..{self.experts}, the number of experts"
            )
        if self.shift_group and (self.shift_group < 2 or self.shift_group % 2 or self.num_virtual_tokens):
            virtual = f", and the model has {self.num_virtual_tokens} of them" if self.num_virtual_tokens else ""
            allowed = f"a positive even number of tokens, in a model without virtual tokens{virtual}"
            raise UserError(f"shift_group={self.shift_group} must be {allowed}")
        check_position_options(self)
        self._check_projections()

    def _check_projections(self) -> None:
        if self.qkv_by_head and not (self.fused_qkv and self.heads == self.kv_heads):
            raise UserError("qkv_by_head needs fused_qkv, and as many kv_heads as heads")
        if self.fused_gate_up and (self.experts or not self.gated):
            raise UserError("fused_gate_up needs a gated MLP without experts")

    @property
    def needs_mask(self) -> bool:
        """Whether a causal mask with one window is not enough for attention."""
        return self.mixed or self.attn_logit_softcap > 0 or self.prefix_length > 0
