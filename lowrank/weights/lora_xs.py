"""LoRA-XS: `W + scale * A @ R @ B`, where only the core R is trained (Bałazy et al. 2024, arXiv:2405.17604).

A and B are frozen at the leading singular triplets of W: with `W = U S V` `[in, out]`, `A = U_r S_r` and `B = V_r`.
EDoRA (Nasiri & Garraghan 2025, arXiv:2501.12067) is DoRA with this update: the magnitude is trained too.

R starts at 0, where the papers draw it from N(0, 1e-10). The gradient `A^T G B^T` of R is not zero there, and the model
starts unchanged.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    materialize,
    name_product,
    trainable,
)
from lowrank.weights import dora
from lowrank.weights.dora import DoRA
from lowrank.weights.lora import LoRA, project_up


@form
class LoRAXS(LoRA):
    """A LoRA with frozen `a` `[..., in, r]` and `b` `[..., r, out]` and a trained `core` `[..., r, r]` between them."""

    a: jax.Array = frozen(axes=("in", None))
    b: jax.Array = frozen(axes=(None, "out"))
    core: jax.Array = trainable()

    def delta(self) -> jax.Array:
        """The update `scale * A @ R @ B`, `[..., in, out]` in float32 or wider."""
        left, b = (at_least_float32(x) for x in self.factors())
        return jnp.matmul(left, b, precision="highest") * self.scale[..., None, None]

    def low_rank_update(self, x: jax.Array) -> jax.Array:
        """`scale * drop(x) @ A @ R @ B` for `x: [..., in]`; in half precision, all products are rounded."""
        t = (dot_to_float32(self._drop(x), self.a) * self.scale).astype(x.dtype)
        return project_up(dot(name_product(t), self.core), self.b)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`(A @ R, B)`."""
        return jnp.matmul(at_least_float32(self.a), at_least_float32(self.core), precision="highest"), self.b


@form
class EDoRA(LoRAXS, DoRA):
    """`magnitude * V / ||V||` with `V = W + scale * A @ R @ B`; the magnitude and the core are trained."""


def attach(lora: LoRA) -> LoRAXS:
    """The LoRA-XS with the base, rank, scale and dropout of `lora`, whose own A and B are replaced."""
    rank, stack = lora.a.shape[-1], lora.shape[:-2]
    live = jnp.any(lora.a != 0, axis=-2)  # [..., r]: the padding of a smaller rank stays zero
    u, s, v = jnp.linalg.svd(materialize(lora.base).astype(jnp.float32), full_matrices=False)
    fields = {f.name: getattr(lora, f.name) for f in dataclasses.fields(LoRA)}
    a, b = u[..., :, :rank] * (s[..., :rank] * live)[..., None, :], v[..., :rank, :] * live[..., :, None]
    return LoRAXS(**{**fields, "a": a, "b": b, "core": jnp.zeros((*stack, rank, rank), jnp.float32)})


def attach_edora(lora: LoRA) -> EDoRA:
    """The EDoRA with the base, rank, scale and dropout of `lora`; its magnitudes start as the norms of W's columns."""
    xs = attach(lora)
    start = dora.attach(xs)
    return EDoRA(**{**vars(start), "core": xs.core})
