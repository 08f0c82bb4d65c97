from flax import linen as nn

from lowrank.models.decoder import Decoder, DecoderConfig, init_cache
from lowrank.models.encoder import Encoder, EncoderConfig

__all__ = ["Decoder", "DecoderConfig", "Encoder", "EncoderConfig", "build", "init_cache"]


def build(config: DecoderConfig | EncoderConfig) -> nn.Module:
    """The model that `config` describes."""
    return Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)
