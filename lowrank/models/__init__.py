"""Decoder and encoder models, driven by their configs: they call `dot` on their weights and know no method."""

import dataclasses

from flax import linen as nn

from lowrank.models import decoder, encoder
from lowrank.models.decoder import Decoder, init_cache
from lowrank.models.decoder_config import DecoderConfig
from lowrank.models.encoder import Encoder, EncoderConfig

__all__ = ["Decoder", "DecoderConfig", "Encoder", "EncoderConfig", "after_training", "block", "build", "init_cache"]


def build(config: DecoderConfig | EncoderConfig) -> nn.Module:
    """The model that `config` describes."""
    return Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)


def block(config: DecoderConfig | EncoderConfig) -> nn.Module:
    """One layer of that model."""
    return (decoder if isinstance(config, DecoderConfig) else encoder).Block(config)


def after_training(config: DecoderConfig | EncoderConfig) -> DecoderConfig | EncoderConfig:
    """`config` as the model is used once it is trained: with full attention."""
    return dataclasses.replace(config, shift_group=0) if getattr(config, "shift_group", 0) else config
