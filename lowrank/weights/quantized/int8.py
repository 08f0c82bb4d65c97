"""8-bit integers and 8-bit floats with one scale per output; the largest inputs may stay in bfloat16 (LLM.int8())."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.weight import KERNEL, at_least_float32, dot_to_float32, form, frozen, static
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
        """The kernel rows and columns that one element of each field stands for."""
        return {"codes": (1, 1), "scale": (None, 1)}

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """The rows (`axis=0`) or columns (`axis=1`) `start ... start + size` of a kernel that is not stacked.

        8-bit floats are sliced as bytes, since XLA converts all of them on a CPU that cannot slice their type. The
        optimization barrier keeps XLA from hoisting the bitcast, which would copy all of them.
        """
        if not jnp.issubdtype(self.codes.dtype, jnp.floating):
            return super().tile(axis, start, size)
        view = lambda x, dtype: jax.lax.bitcast_convert_type(x, dtype)  # noqa: E731
        codes, start = jax.lax.optimization_barrier((self.codes, start))
        as_bytes = dataclasses.replace(self, codes=view(codes, jnp.uint8))
        tile = Quantized.tile(as_bytes, axis, start, size)
        return dataclasses.replace(tile, codes=view(tile.codes, self.codes.dtype))

    def decode(self) -> jax.Array:
        """`codes * scale`."""
        scale = at_least_float32(self.scale)
        return self.codes.astype(scale.dtype) * jnp.broadcast_to(scale, self.codes.shape)


@form
class WithOutliers(PerChannel):
    """int8 with k inputs in bfloat16, as in LLM.int8(): the rows `index` `[..., k]` are in `outliers` `[..., k, out]`.

    The codes of these rows are 0. Dettmers et al. 2022 (arXiv:2208.07339) choose the inputs by the activations of each
    batch; here the weights decide, once, so that every step multiplies by the same kernel.
    """

    outliers: jax.Array = frozen(axes=KERNEL)
    index: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """The dequantized kernel `[..., in, out]` with its outlier rows."""
        kernel = super().materialize()
        one_hot = jax.nn.one_hot(self.index, self.rows, axis=-2, dtype=kernel.dtype)  # [..., in, k]
        return kernel + jnp.matmul(one_hot, self.outliers.astype(kernel.dtype), precision="highest")

    def dot_in(self, x: jax.Array, dtype: Any, implementation: str = "auto") -> jax.Array:
        """`x @ codes * scale + x[index] @ outliers`, rounded once."""
        inliers = PerChannel(codes=self.codes, scale=self.scale, rows=self.rows, dtype_name=self.dtype_name)
        outliers = dot_to_float32(jnp.take(x, self.index, axis=-1), self.outliers.astype(self.dtype))
        return (inliers.dot_in(x, outliers.dtype, implementation) + outliers).astype(dtype)


def quantize_int8(w: jax.Array) -> PerChannel:
    """int8 codes `round(w * 127 / max|w|)` of a kernel `[..., in, out]`, with the largest magnitude of each output."""
    kernel = w.astype(jnp.float32)
    absmax = _absmax(kernel)
    codes = jnp.round(kernel * jnp.broadcast_to(reciprocal_scale(absmax, 127), kernel.shape)).astype(jnp.int8)
    return PerChannel(codes=codes, scale=absmax / 127, rows=w.shape[-2], dtype_name=jnp.dtype(w.dtype).name)


def quantize_fp8(w: jax.Array, *, float_format: str = "e4m3") -> PerChannel:
    """8-bit floats, scaled so that the largest magnitude of each output is the format's largest value.

    Raises UserError for a format that is not `e4m3` or `e5m2`.
    """
    if float_format not in FLOATS:
        raise unknown("8-bit float", float_format, FLOATS)
    kernel, largest = w.astype(jnp.float32), float(jnp.finfo(FLOATS[float_format]).max)
    absmax = _absmax(kernel)
    scale = jnp.where(absmax > 0, absmax / largest, 1)
    codes = jnp.clip(kernel / jnp.broadcast_to(scale, kernel.shape), -largest, largest).astype(FLOATS[float_format])
    return PerChannel(codes=codes, scale=scale, rows=w.shape[-2], dtype_name=jnp.dtype(w.dtype).name)


def quantize_llm_int8(w: jax.Array, *, outliers: int) -> WithOutliers:
    """int8 codes, with the rows of the `outliers` inputs that have the largest weights in bfloat16.

    Raises UserError unless there are at least 1 and at most as many outliers as inputs.
    """
    if not 0 < outliers <= w.shape[-2]:
        raise UserError(
            f"a kernel with {plural(w.shape[-2], 'input')} cannot have {plural(outliers, 'outlier')}: "
            f"quantize.outliers must be from 1 to {w.shape[-2]}"
        )
    kernel = w.astype(jnp.float32)
    index = jax.lax.top_k(jnp.max(jnp.abs(kernel), axis=-1), outliers)[1]  # [..., k]
    rows = jnp.take_along_axis(w, index[..., None], axis=-2).astype(jnp.bfloat16)
    is_outlier = jnp.any(jax.nn.one_hot(index, w.shape[-2], dtype=bool), axis=-2)[..., None]
    inliers = quantize_int8(jnp.where(jnp.broadcast_to(is_outlier, w.shape), 0, w))
    return WithOutliers(**vars(inliers), outliers=rows, index=index.astype(jnp.int32))


def _absmax(kernel: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
