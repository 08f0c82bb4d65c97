"""Offloads the optimizer's state to the host's memory and streams it to the device leaf by leaf (arXiv:2305.14314).

QLoRA pages the state with unified memory, which one vendor offers. Here the sharding of a leaf of the state places it
in pinned host memory, and the compiled step copies it to the device for the update and back.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.extend.core import ClosedJaxpr, Literal

from lowrank.core.typing import PyTree

HOST = "pinned_host"
Space = jax.memory.Space
Update = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]  # (gradient, state, trained) -> (trained, state)


def has_host(mesh: Any) -> bool:
    """Whether the devices of `mesh` address pinned host memory; those of an abstract mesh are assumed to."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return True
    return all(HOST in memory_kinds(device) for device in mesh.devices.flat)


def memory_kinds(device: Any) -> list[str]:
    """The memory kinds that `device` can address."""
    return [memory.kind for memory in device.addressable_memories()]


def owners(optimizer: optax.GradientTransformation, state: PyTree, trained: PyTree) -> PyTree:
    """The index of the trained leaf that each leaf of a state belongs to; -1 for scalars and for shared leaves."""
    indices = jax.tree.unflatten(jax.tree.structure(trained), range(len(jax.tree.leaves(trained))))

    def masked(leaf: Any) -> bool:  # stands for a parameter of another label group
        return isinstance(leaf, optax.MaskedNode)

    def index(leaf: Any, i: int) -> Any:
        return leaf if masked(leaf) else i if leaf.ndim else -1

    return optax.tree.map_params(optimizer, index, state, indices, transform_non_params=lambda _: -1, is_leaf=masked)


def offload_shardings(where: PyTree, owner: PyTree) -> PyTree:
    """The shardings `where` of a state, in the host's memory for each leaf that belongs to a trained leaf."""
    return jax.tree.map(lambda s, i: s if i < 0 else s.with_memory_kind(HOST), where, owner)


def stream_state(update: Update, optimizer: Any, gradient: PyTree, state: PyTree, trained: PyTree) -> Any:
    """`update(gradient, state, trained)`, inside jit, where a part of the state may lie on the host.

    Without such a part the result is that of `update` itself. Otherwise the leaves of the state are copied to the
    device, updated and copied back to the host one trained leaf after the other. Barriers keep the leaves in order:
    without them the compiler fetches the whole state at once, and saves no memory. The structure of `optimizer` decides
    which leaf of the state belongs to which trained leaf.
    """
    args, states = (gradient, state, trained), jax.tree.leaves(state)
    if not any(_on_host(x) for x in states):
        return update(*args)
    program, shapes = jax.make_jaxpr(update, return_shape=True)(*jax.tree.map(_on_device, args))
    pieces = _Pieces(program, jax.tree.leaves(args))
    n, found = len(jax.tree.leaves(trained)), dict[int, Any]()
    owner = dict(enumerate(jax.tree.leaves(owners(optimizer, state, trained)), n))  # of each output of the program
    for i in range(n):
        outputs = [i, *(j for j, of in owner.items() if of == i)]
        values = dict(zip(outputs, pieces.outputs(outputs, after=found.get(i - 1)), strict=True))
        sent = {j: jax.device_put(x, Space.Host) for j, x in values.items() if j >= n and _on_host(states[j - n])}
        found |= jax.lax.optimization_barrier(values | sent)
    shared = [j for j, of in owner.items() if of < 0]
    found |= dict(zip(shared, pieces.outputs(shared), strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[j] for j in range(len(found))])


def _on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == Space.Host


def _on_device(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


class _Pieces:
    """A program that is evaluated in pieces, each equation once; arguments on the host are copied when needed."""

    def __init__(self, program: ClosedJaxpr, args: list[jax.Array]):
        self._jaxpr = program.jaxpr
        given = dict(zip(self._jaxpr.invars, args, strict=True))
        self._far = {v: x for v, x in given.items() if _on_host(x)}
        self._known = dict(zip(self._jaxpr.constvars, program.consts, strict=True))
        self._known |= {v: x for v, x in given.items() if v not in self._far}

    def outputs(self, indices: list[int], after: jax.Array | None = None) -> list[jax.Array]:
        """The outputs of these indices; the arguments that they need from the host are fetched after `after`."""
        wanted = [self._jaxpr.outvars[i] for i in indices]
        needed, missing = {v for v in wanted if not isinstance(v, Literal)}, []
        for equation in reversed(self._jaxpr.eqns):
            if any(v in needed and v not in self._known for v in equation.outvars):
                missing.append(equation)
                needed.update(v for v in equation.invars if not isinstance(v, Literal))
        fetched = {v: self._far.pop(v) for v in self._jaxpr.invars if v in needed and v in self._far}
        if fetched and after is not None:
            some, _ = jax.lax.optimization_barrier((list(fetched.values()), after))
            fetched = dict(zip(fetched, some, strict=True))
        self._known |= {v: jax.device_put(x, Space.Device) for v, x in fetched.items()}
        for equation in reversed(missing):
            options = equation.primitive.get_bind_params(equation.params)
            values = equation.primitive.bind(*map(self._value, equation.invars), **options)
            several = equation.primitive.multiple_results
            self._known |= zip(equation.outvars, values if several else [values], strict=True)
        return [self._value(v) for v in wanted]

    def _value(self, v: Any) -> Any:
        return v.val if isinstance(v, Literal) else self._known[v]
