"""The models: one decoder and one encoder, driven by configs. They call `dot` on their weights and know no method."""

import dataclasses
from typing import Any, TypeVar

from flax import linen as nn

from lowrank.models import decoder, encoder
from lowrank.models.attention_forms import describe_attention
from lowrank.models.decoder import Decoder, init_cache
from lowrank.models.decoder_config import DecoderConfig
from lowrank.models.encoder import Encoder, EncoderConfig

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "build_block",
    "build_model",
    "describe_attention",
    "inference_config",
    "init_cache",
]
ModelConfig = TypeVar("ModelConfig")


def build_model(config: DecoderConfig | EncoderConfig) -> nn.Module:
    """The model that `config` describes."""
    return Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)


def build_block(config: DecoderConfig | EncoderConfig) -> nn.Module:
    """One layer of the model that `config` describes."""
    return decoder.Block(config) if isinstance(config, DecoderConfig) else encoder.Block(config)


def inference_config(config: ModelConfig) -> ModelConfig:
    """The config of the trained model: shifted sparse attention, which only training uses, becomes full attention."""
    trained: Any = config
    return dataclasses.replace(trained, shift_group=0) if getattr(trained, "shift_group", 0) else config
