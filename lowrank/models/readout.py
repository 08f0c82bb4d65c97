"""From features to logits that are float32 whatever the compute dtype."""

import jax
from flax import linen as nn

from lowrank import weight
from lowrank.models.layers import kernel_init, stored


class Readout(nn.Module):
    """`x @ kernel`, accumulated and returned in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., features]`."""
        return weight.wide_dot(x, stored(self, "kernel", kernel_init, (x.shape[-1], self.features)))
