"""The product of rows with a kernel in codes: the form in plain JAX, or the body for few rows and codes in four bits.

The bodies have no gradient of their own: the forms in codes, which call this, decode again for theirs.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lowrank.core.errors import UserError
from lowrank.kernels import half_precision_matmul
from lowrank.kernels.dispatch import Body, Operation, mesh_of
from lowrank.kernels.four_bit_matmul import gpu, tpu

ROWS = 64  # the most rows
UNIT = 16  # divides a block whose halves fill a TPU's registers
SIGNED = tuple(float(i - 8) for i in range(16))  # the levels of symmetric integers
DATA = "data"  # the axis of the mesh that shards rows, and no kernel


class FourBits(NamedTuple):
    """What codes in four bits stand for: `levels[code] * scale`, packed block by block, and the rows of a block."""

    levels: tuple[float, ...]
    block: int


class Kernel(Protocol):
    """A kernel `[in, out]` in codes."""

    codes: Any
    scale: Any

    @property
    def dtype(self) -> Any:
        """The dtype that its entries are rounded to before they are multiplied."""

    @property
    def four_bits(self) -> FourBits | None:
        """What its codes stand for; None for other codes."""


def four_bit_matmul(
    x: jax.Array, w: Kernel, plain: Mapping[str, Body], out: Any = None, implementation: str = "auto"
) -> jax.Array:
    """`x @ W` `[..., out]` for `x` `[..., in]`, in the dtype `out`; None stands for the dtype of `x`.

    `plain` has the product `(x, w) -> y` in plain JAX for each platform, as `Operation.xla`. `auto` takes another body
    only where it pads neither the rows nor the codes. Raises UserError for a named body that cannot take these.
    """
    out = x.dtype if out is None else out
    why = refusal(x, w, implementation)
    if why and implementation not in ("auto", "xla"):
        raise UserError(f"implementation={implementation!r} of four_bit_matmul {why}: use 'xla'")
    mesh, bodies = mesh_of((w, x)), {}
    if not why and (implementation != "auto" or tpu.is_whole(_rows(x) // _parts(x, mesh), w.codes.shape)):
        bodies = {f"pallas_{name}": _body(m.multiply, out, mesh) for name, m in (("tpu", tpu), ("gpu", gpu))}
    operation = Operation("four_bit_matmul", xla=plain, **bodies, partitions=_is_replicated(mesh))
    return operation(x, w, implementation=implementation)


def refusal(x: jax.Array, w: Kernel, implementation: str) -> str:
    """The reason why a Pallas body does not multiply these rows by this kernel, or an empty string."""
    operand = _operand(x, w)
    if w.four_bits is None:
        return f"takes codes of 4 bits with one scale per block, not {type(w).__name__}"
    if w.dtype not in (operand, jnp.float32) or operand not in (*half_precision_matmul.HALF, jnp.float32):
        return f"takes rows and kernels of one dtype or a float32 kernel, not {x.dtype} and {w.dtype}"
    block = w.four_bits.block
    if block % UNIT or tpu.ROWS % (block // 2):
        return f"takes blocks of 16 to 1024 rows that are a power of two, not {block}"
    if _rows(x) > ROWS:
        return f"takes a batch to {ROWS}, not {_rows(x)}"
    if implementation == "pallas_gpu" and operand not in gpu.DTYPES:
        return f"takes bfloat16 or float16, not {operand}"
    return ""


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def _parts(x: jax.Array, mesh: AbstractMesh) -> int:
    """The number of devices among which the compiler would divide the rows: the mesh's axis `data`, or 1."""
    size = 1 if AxisType.Manual in mesh.axis_types else mesh.shape.get(DATA, 1)
    return size if _rows(x) % size == 0 else 1


def _operand(x: jax.Array, w: Kernel) -> Any:
    """The dtype that the rows and the kernel's entries are multiplied in."""
    return w.dtype if half_precision_matmul.is_mixed(x, w) else x.dtype


def _is_replicated(mesh: AbstractMesh) -> bool:
    """Whether no axis of the mesh shards a kernel, and `_body` can divide the rows over it."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return all(size == 1 or (name == DATA and kind == AxisType.Auto) for name, size, kind in axes)


def _body(multiply: Callable[..., jax.Array], out: Any, mesh: AbstractMesh) -> Body:
    """A body `(x, w) -> y` of `multiply`, each device of a mesh taking its own rows."""

    def body(x: jax.Array, w: Any, **options: Any) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]).astype(_operand(x, w))
        product = functools.partial(multiply, **w.four_bits._asdict(), out=out, **options)
        if mesh.size > 1 and AxisType.Manual not in mesh.axis_types:
            along, whole = PartitionSpec(DATA if _parts(x, mesh) > 1 else None), PartitionSpec()
            specs: Any = {"in_specs": (along, whole, whole), "out_specs": along}
            product = jax.shard_map(product, mesh=mesh, **specs, check_vma=False)
        return product(rows, w.codes, w.scale).reshape(*x.shape[:-1], w.codes.shape[1])

    return body
