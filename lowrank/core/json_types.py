"""The types of what is read as JSON from outside: of checkpoints, tokenizers, adapters and the files beside them.

Each key may be null or missing, unless it has no default. Keys that are not here are not read, or may be anything.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct, field

Count = Annotated[int, Meta(ge=0)]
Flag = bool | int
Names = str | list[str]
Group = dict[str, Any]


class RopeParameters(Struct):
    """`rope_scaling` and `rope_parameters` of a `config.json`, which may have one group for each kind of layer."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None
    partial_rotary_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None
    full_attention: "RopeParameters | None" = None
    sliding_attention: "RopeParameters | None" = None


class ModelConfig(Struct):
    """A `config.json`."""

    model_type: str | None = None
    # sizes, each a count
    vocab_size: Count | None = None
    type_vocab_size: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    head_dim: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    num_hidden_layers: Count | None = None
    max_position_embeddings: Count | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: Count | None = None
    decoder_sparse_step: Count | None = None
    max_window_layers: Count | None = None
    sliding_window: Count | None = None
    sliding_window_pattern: Count | None = None
    n_embd: Count | None = None
    n_inner: Count | None = None
    n_head: Count | None = None
    n_layer: Count | None = None
    n_positions: Count | None = None
    dim: Count | None = None
    hidden_dim: Count | None = None
    n_heads: Count | None = None
    n_layers: Count | None = None
    original_max_position_embeddings: Count | None = None
    local_attention: Count | None = None
    global_attn_every_n_layers: Count | None = None
    no_rope_layer_interval: Count | None = None
    embedding_size: Count | None = None
    position_buckets: int | None = None
    max_relative_positions: int | None = None
    # numbers
    rms_norm_eps: float | None = None
    layer_norm_eps: float | None = None
    layer_norm_epsilon: float | None = None
    rope_theta: float | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    clip_qkv: float | None = None
    norm_eps: float | None = None
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    attention_multiplier: float | None = None
    logits_scaling: float | None = None
    rotary_pct: float | None = None
    rotary_emb_base: float | None = None
    global_rope_theta: float | None = None
    local_rope_theta: float | None = None
    # choices
    hidden_act: str | None = None
    hidden_activation: str | None = None
    activation_function: str | None = None
    activation: str | None = None
    classifier_activation: str | None = None
    classifier_pooling: str | None = None
    pooler_hidden_act: str | None = None
    pos_att_type: Names | None = None
    no_rope_layers: list[Flag] | None = None
    position_embedding_type: str | None = None
    layer_types: list[str] | None = None
    mlp_only_layers: list[Count] | None = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    attention_bias: Flag | None = None
    mlp_bias: Flag | None = None
    qkv_bias: Flag | None = None
    norm_bias: Flag | None = None
    classifier_bias: Flag | None = None
    use_parallel_residual: Flag | None = None
    text_config: Group | None = None
    norm_topk_prob: Flag | None = None
    use_sliding_window: Flag | None = None
    tie_word_embeddings: Flag | None = None


class StoredCodes(Struct):
    """The `quantization_config` of a checkpoint in codes of this package."""

    scheme: Group
    high: dict[str, Count] | None = None


class SafetensorsIndex(Struct):
    """A `model.safetensors.index.json`."""

    weight_map: dict[str, str]


class SafetensorsEntry(Struct):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, Meta(ge=0)]]
    data_offsets: tuple[int, int]


class AddedToken(Struct):
    """A special token that is not written as its text alone."""

    content: str


Special = str | AddedToken | None


class TokenizerConfig(Struct):
    """A `tokenizer_config.json` or `special_tokens_map.json`. What is no template is an error where one is needed."""

    bos_token: Special = None
    cls_token: Special = None
    eos_token: Special = None
    sep_token: Special = None
    pad_token: Special = None
    unk_token: Special = None


class GenerationConfig(Struct):
    """A `generation_config.json`; an id that can be none, such as -1, stands for none."""

    eos_token_id: int | list[int] | None = None


class AdapterConfig(Struct):
    """An `adapter_config.json`."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: str | None = None
    peft_version: str | None = None
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    feedforward_modules: Names | None = None
    layers_pattern: Names | None = None
    target_parameters: Names | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    rank_pattern: Group | None = None
    alpha_pattern: Group | None = None
    token_indices: list[int] | None = None
    trainable_token_indices: list[int] | Group | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_dropout: float | None = None


class TrainedLeaves(Struct):
    """A `trained.json`, beside trained leaves by name, or a `method.json`, beside an adapter in the PEFT format."""

    base: str
    model: Group
    method: Group
    base_hash: str = ""


class RunModel(Struct):
    """The group `model` of a run's config."""

    name: str


class RunConfig(Struct):
    """The `config.json` of a run's folder."""

    model: RunModel


class GGUFMetadata(Struct):
    """What is read of a GGUF file's metadata, beside the numbers of its architecture."""

    architecture: str | None = field(default=None, name="general.architecture")
    alignment: Count | None = field(default=None, name="general.alignment")
    model: str | None = field(default=None, name="tokenizer.ggml.model")
    pre: str | None = field(default=None, name="tokenizer.ggml.pre")
    tokens: list[str] | None = field(default=None, name="tokenizer.ggml.tokens")
    token_type: list[int] | None = field(default=None, name="tokenizer.ggml.token_type")
    scores: list[float] | None = field(default=None, name="tokenizer.ggml.scores")
    merges: list[str] | None = field(default=None, name="tokenizer.ggml.merges")
    bos: int | None = field(default=None, name="tokenizer.ggml.bos_token_id")
    eos: int | None = field(default=None, name="tokenizer.ggml.eos_token_id")
    unknown: int | None = field(default=None, name="tokenizer.ggml.unknown_token_id")
    padding: int | None = field(default=None, name="tokenizer.ggml.padding_token_id")
    eot: int | None = field(default=None, name="tokenizer.ggml.eot_token_id")
    eom: int | None = field(default=None, name="tokenizer.ggml.eom_token_id")
    chat_template: str | None = field(default=None, name="tokenizer.chat_template")
