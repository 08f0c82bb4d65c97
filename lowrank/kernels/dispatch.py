"""Which body of an operation runs: the one that is named, or for `auto` the one that a committed result speaks for.

An operation has one meaning and several bodies: plain JAX, which runs everywhere, and Pallas kernels for TPUs and for
NVIDIA's GPUs. A body is chosen by the platform that a program is lowered for and by the kind of device of the mesh that
its arguments lie on, never by the default backend, which is another one where a program is compiled ahead of time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType

from lowrank.core.errors import UserError, unknown

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_gpu", "interpret")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
MOSAIC_GPUS = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # the kinds of GPU that Mosaic compiles these bodies for
# Kind of device -> operation -> the body that `auto` takes in place of plain JAX. A line is allowed where a file of
# experiments/bench/results shows that body to be faster on that GPU than the fastest form in plain JAX, or as compiled
# for that TPU to move fewer bytes with no more temporaries at equal FLOPs.
SHOWN: dict[str, dict[str, str]] = {
    "TPU v5 lite": {"four_bit_matmul": "pallas_tpu", "grouped_lora": "pallas_tpu"},
    "TPU v6 lite": {"four_bit_matmul": "pallas_tpu", "grouped_lora": "pallas_tpu"},
}

Body = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A function of arrays (or trees of them) and of keyword options, with a body for each implementation.

    Attributes:
      name: the name in errors, logs and `SHOWN`.
      xla: the body in plain JAX, or one for each platform (`cpu`, `cuda`, `rocm`, `tpu`) and `default`.
      pallas_tpu: the Pallas body for TPUs. It has the option `interpret`, for Pallas's interpreter.
      pallas_gpu: the body in Pallas's Mosaic GPU.
      partitions: whether the Pallas bodies run on a mesh of several devices; a plain Pallas call does not.
    """

    name: str
    xla: Body | Mapping[str, Body]
    pallas_tpu: Body | None = None
    pallas_gpu: Body | None = None
    partitions: bool = False

    def __call__(self, *arrays: Any, implementation: str = "auto", **options: Any) -> Any:
        """The result of the body that `resolve` chooses.

        Raises UserError for a named body that cannot run, when the program is traced or lowered.
        """
        chosen = self.resolve(implementation, mesh_of(arrays))
        bind = lambda body: functools.partial(body, **options)  # noqa: E731
        plain = self.xla if isinstance(self.xla, Mapping) else {"default": self.xla}
        if chosen == "xla":
            return jax.lax.platform_dependent(*arrays, **{name: bind(body) for name, body in plain.items()})
        if chosen == "interpret":
            return functools.partial(bind(self.pallas_tpu), interpret=True)(*arrays)
        bodies = plain
        if implementation != "auto":
            only = f"it is only for {PLATFORMS[chosen]}, not for this platform"
            bodies = {"default": refused(plain["default"], self._error(chosen, only))}
        bodies = {**bodies, PLATFORMS[chosen]: getattr(self, chosen)}
        return jax.lax.platform_dependent(*arrays, **{name: bind(body) for name, body in bodies.items()})

    def resolve(self, implementation: str, mesh: AbstractMesh) -> str:
        """The name of the body that runs for arrays on this mesh: `auto` is replaced, another name is checked.

        Raises UserError for a name that is unknown, or whose body is missing or cannot run on this mesh.
        """
        device = mesh.abstract_device
        divided = not self.partitions and _is_partitioned_automatically(mesh)
        if implementation == "auto":
            shown = SHOWN.get(device.device_kind, {}) if device and not divided else {}
            body = shown.get(self.name, "xla")
            return body if getattr(self, body) else "xla"
        if implementation not in IMPLEMENTATIONS:
            raise unknown("implementation", implementation, IMPLEMENTATIONS)
        if implementation == "xla":
            return implementation
        if getattr(self, implementation.replace("interpret", "pallas_tpu")) is None:
            raise self._error(implementation, f"{self.name} has no such body")
        if device and not runs_on(implementation, device.device_kind):
            raise self._error(implementation, f"it does not run on {device.device_kind}")
        if divided:
            where = "call it inside jax.shard_map"
            raise self._error(implementation, f"it is not partitioned over a mesh of {mesh.size} devices: {where}")
        return implementation

    def _error(self, implementation: str, why: str) -> UserError:
        others = [name for name in PLATFORMS if getattr(self, name) and name != implementation]
        can = ", ".join(repr(name) for name in ("auto", "xla", *others))
        return UserError(f"implementation={implementation!r} of {self.name} cannot run: {why}; its others are {can}")


def refused(plain: Body, error: UserError) -> Body:
    """The shapes and derivatives of the body `plain`, and the error where a program with it is lowered."""

    def body(*arrays: Any, **options: Any) -> Any:
        one = _refusal.bind(error=str(error))
        return jax.tree.map(lambda y: y * one.astype(y.dtype), plain(*arrays, **options))

    return body


def runs_on(implementation: str, kind: str) -> bool:
    """Whether a body of this name runs on devices of this kind, as `device_kind` reports it."""
    starts = {"pallas_tpu": ("TPU",), "pallas_gpu": MOSAIC_GPUS}
    return kind.startswith(starts.get(implementation, ""))


def mesh_of(arrays: Any) -> AbstractMesh:
    """The mesh that one of the arrays lies on, or else the mesh that is set; it is empty if neither is there."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    return next((mesh for mesh in meshes if mesh.abstract_device), jax.sharding.get_abstract_mesh())


def describe(kind: str) -> str:
    """One line for the log: what `auto` takes on devices of this kind, as `device_kind` reports it."""
    shown = SHOWN.get(kind)
    taken = ", ".join(f"{name} {body}" for name, body in sorted((shown or {}).items()))
    if taken:
        return f"kernels on {kind}: {taken}; the others in plain JAX"
    old = kind.startswith("NVIDIA") and not runs_on("pallas_gpu", kind)
    return f"kernels on {kind}: all in plain JAX" + (", as Mosaic GPU does not run there" if old else "")


def _is_partitioned_automatically(mesh: AbstractMesh) -> bool:
    """Whether the compiler divides arrays over several devices, as it does outside of `jax.shard_map`."""
    sizes: Sequence[int] = [
        size for size, kind in zip(mesh.shape.values(), mesh.axis_types, strict=True) if kind != AxisType.Manual
    ]
    return math.prod(sizes) > 1


_refusal = Primitive("refused_implementation")  # a number, and an error as soon as it is lowered or run


def _refuse(*_: Any, error: str) -> Any:
    raise UserError(error)


_refusal.def_impl(_refuse)
_refusal.def_abstract_eval(lambda *, error: jax.core.ShapedArray((), jnp.float32))
mlir.register_lowering(_refusal, _refuse)
