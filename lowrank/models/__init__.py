from flax import linen as nn

from lowrank.models.decoder import Decoder, DecoderConfig, init_cache

__all__ = ["Decoder", "DecoderConfig", "build", "init_cache"]


def build(config: DecoderConfig) -> nn.Module:
    """The model that `config` describes."""
    return Decoder(config)
