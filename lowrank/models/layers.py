"""The building blocks of decoders and encoders: Linear, Norm, MLP, and reading a parameter that may be a form.

Kernels are 2-D `[in, out]`. Shapes: B rows, T tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lowrank.core import weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "tanh": jnp.tanh,
}

# The activations that a rematerialization policy can name.
SAVEABLE = ("input", "query", "key", "value", "context", "attn", "gate", "up", "mlp")
kernel_init = nn.initializers.normal(0.02)


def read_parameter(module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> Any:
    """The parameter `name` of `module`: the stored array or form, or `init(key, shape)` at initialization.

    `Module.param` compares only the first leaf of a form. Raises ValueError when the stored shape is not `shape`.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value: Any = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"{'/'.join((*module.path, name))} has shape {value.shape}, the model needs {shape}")
    return value


class Linear(nn.Module):
    """`x @ kernel (+ bias)`, in the dtype of `x`; the kernel may be any weight."""

    features: int
    bias: bool = False
    initializer: Callable[..., jax.Array] = kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., features]`."""
        kernel = read_parameter(self, "kernel", self.initializer, (x.shape[-1], self.features))
        bias = read_parameter(self, "bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        return weight.affine(x, kernel, bias)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis; computed in float32, returned in the input's dtype.

    `offset` is added to the stored scale: Gemma stores `scale - 1`. A LayerNorm may have no `bias`.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = read_parameter(self, "scale", nn.initializers.constant(1 - self.offset), x.shape[-1:])
        y = y * jnp.broadcast_to(scale.astype(jnp.float32) + self.offset, y.shape)
        if self.kind == "layer" and self.bias:
            bias = read_parameter(self, "bias", nn.initializers.zeros, x.shape[-1:])
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int
    activation: str
    gated: bool = False
    bias: bool = False
    fused: bool = False  # one kernel `gate_up` instead of two

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        act = ACTIVATIONS[self.activation]
        if self.fused:
            both = Linear(2 * self.hidden, self.bias, name="gate_up")(x_BxTxD)
            gate, up = (checkpoint_name(y, n) for n, y in zip(("gate", "up"), jnp.split(both, 2, axis=-1), strict=True))
            return Linear(x_BxTxD.shape[-1], self.bias, name="down")(act(gate) * up)
        up = checkpoint_name(Linear(self.hidden, self.bias, name="up")(x_BxTxD), "up")
        gate = checkpoint_name(Linear(self.hidden, self.bias, name="gate")(x_BxTxD), "gate") if self.gated else None
        h = act(up) if gate is None else act(gate) * up
        return Linear(x_BxTxD.shape[-1], self.bias, name="down")(h)


class Head(nn.Module):
    """`x @ kernel (+ bias)`, accumulated and returned in float32; the kernel may be any weight."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., features]`."""
        kernel = read_parameter(self, "kernel", kernel_init, (x.shape[-1], self.features))
        bias = read_parameter(self, "bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        return weight.affine_to_float32(x, kernel, bias)
