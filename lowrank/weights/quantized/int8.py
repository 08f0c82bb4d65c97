"""int8 with one scale for each output, plain or with the widest inputs kept in bfloat16, and 8-bit floats."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import KERNEL, at_least_float32, dot, form, frozen, static
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.packing import reciprocal_scale

FLOATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@form
class PerChannel(Quantized):
    """`W = codes * scale`: `codes` int8 or an 8-bit float `[..., in, out]`, `scale` `[..., 1, out]`."""

    codes: jax.Array = frozen(axes=KERNEL)
    scale: jax.Array = frozen(axes=KERNEL)
    rows: int = static()
    dtype_name: str = static()

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """Rows and columns that each element of a field stands for."""
        return {"codes": (1, 1), "scale": (None, 1)}

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """As for all; 8-bit floats are cut as bytes, since XLA widens all of them where a CPU cannot slice them."""
        if not jnp.issubdtype(self.codes.dtype, jnp.floating):
            return super().tile(axis, start, size)
        view = lambda x, dtype: jax.lax.bitcast_convert_type(x, dtype)  # noqa: E731
        codes, start = jax.lax.optimization_barrier((self.codes, start))  # else it would view, and copy, all of them
        cut = dataclasses.replace(self, codes=view(codes, jnp.uint8))
        cut = Quantized.tile(cut, axis, start, size)
        return dataclasses.replace(cut, codes=view(cut.codes, self.codes.dtype))

    def decode(self) -> jax.Array:
        """`codes * scale`."""
        scale = at_least_float32(self.scale)
        return self.codes.astype(scale.dtype) * jnp.broadcast_to(scale, self.codes.shape)


@form
class WithOutliers(PerChannel):
    """LLM.int8()'s split by inputs: the rows `index` `[..., k]` are in `outliers` bfloat16 `[..., k, out]`, codes 0.

    Dettmers et al. 2022 (arXiv:2208.07339) split by the activations of each batch; here it is once and for all, by
    the weights, so that every step multiplies by the same kernel.
    """

    outliers: jax.Array = frozen(axes=KERNEL)
    index: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """The kernel with its outlying rows put back."""
        kernel = super().materialize()
        hot = jax.nn.one_hot(self.index, self.rows, axis=-2, dtype=kernel.dtype)  # [..., in, k]
        return kernel + jnp.matmul(hot, self.outliers.astype(kernel.dtype), precision="highest")

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ codes * scale + x[index] @ outliers`."""
        within = PerChannel(codes=self.codes, scale=self.scale, rows=self.rows, dtype_name=self.dtype_name)
        return within.dot(x) + dot(jnp.take(x, self.index, axis=-1), self.outliers)


def quantize_int8(w: jax.Array) -> PerChannel:
    """Codes by the largest magnitude of each output: `round(w * 127 / max|w|)`."""
    kernel = w.astype(jnp.float32)
    absmax = _absmax(kernel)
    codes = jnp.round(kernel * jnp.broadcast_to(reciprocal_scale(absmax, 127), kernel.shape)).astype(jnp.int8)
    return PerChannel(codes=codes, scale=absmax / 127, rows=w.shape[-2], dtype_name=jnp.dtype(w.dtype).name)


def quantize_fp8(w: jax.Array, *, float_: str = "e4m3") -> PerChannel:
    """8-bit floats scaled so that the largest magnitude of each output is the format's largest."""
    if float_ not in FLOATS:
        raise unknown("8-bit float", float_, FLOATS)
    kernel, top = w.astype(jnp.float32), float(jnp.finfo(FLOATS[float_]).max)
    absmax = _absmax(kernel)
    scale = jnp.where(absmax > 0, absmax / top, 1)
    codes = jnp.clip(kernel / jnp.broadcast_to(scale, kernel.shape), -top, top).astype(FLOATS[float_])
    return PerChannel(codes=codes, scale=scale, rows=w.shape[-2], dtype_name=jnp.dtype(w.dtype).name)


def quantize_llm_int8(w: jax.Array, *, outliers: int) -> WithOutliers:
    """int8, and the `outliers` inputs with the largest weights in bfloat16."""
    if not 0 < outliers <= w.shape[-2]:
        raise UserError(f"{outliers} outlying inputs of a kernel with {w.shape[-2]}")
    kernel = w.astype(jnp.float32)
    index = jax.lax.top_k(jnp.max(jnp.abs(kernel), axis=-1), outliers)[1]  # [..., k]
    rows = jnp.take_along_axis(w, index[..., None], axis=-2).astype(jnp.bfloat16)
    outlying = jnp.any(jax.nn.one_hot(index, w.shape[-2], dtype=bool), axis=-2)[..., None]
    rest = quantize_int8(jnp.where(jnp.broadcast_to(outlying, w.shape), 0, w))
    return WithOutliers(**vars(rest), outliers=rows, index=index.astype(jnp.int32))


def _absmax(kernel: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
