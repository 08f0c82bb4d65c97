"""A function of trees under jit that hands its unchanged arrays through, where jit would copy them."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank.core.typing import PyTree


def sources(fn: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, list[int | None]]:
    """`(shapes of fn(*args), which leaf of args each of its leaves is)`, None for a leaf that is computed."""
    program, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    given = {id(var): i for i, var in enumerate(program.jaxpr.invars)}
    return shapes, [given.get(id(var)) for var in program.jaxpr.outvars]


def jit_passthrough(fn: Callable[..., PyTree], where: PyTree, *args: PyTree) -> Callable[..., PyTree]:
    """`fn` under jit for arguments like `args`; what it hands through stays the array it was, where jit would copy."""
    shapes, origins = sources(fn, *args)

    def some(values: PyTree) -> list[Any]:
        return [x for x, source in zip(jax.tree.leaves(values), origins, strict=True) if source is None]

    made = jax.jit(lambda *args: some(fn(*args)), out_shardings=some(where))

    def compute(*args: PyTree) -> PyTree:
        given, fresh = jax.tree.leaves(args), iter(made(*args))
        leaves = [next(fresh) if source is None else given[source] for source in origins]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return compute
