"""A function of trees under jit that returns its unchanged arguments as they are, where jit alone would copy them."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank.core.typing import PyTree


def output_sources(fn: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, list[int | None]]:
    """`(shapes of fn(*args), sources)`: the index of the leaf of `args` that each output is, None if it is computed."""
    program, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    given = {id(var): i for i, var in enumerate(program.jaxpr.invars)}
    return shapes, [given.get(id(var)) for var in program.jaxpr.outvars]


def jit_passthrough(fn: Callable[..., PyTree], where: PyTree, *args: PyTree) -> Callable[..., PyTree]:
    """`fn` under jit for arguments like `args`, with the shardings `where`; unchanged arguments are not copied."""
    shapes, sources = output_sources(fn, *args)

    def computed(outputs: PyTree) -> list[Any]:
        return [x for x, source in zip(jax.tree.leaves(outputs), sources, strict=True) if source is None]

    program = jax.jit(lambda *args: computed(fn(*args)), out_shardings=computed(where))

    def compute(*args: PyTree) -> PyTree:
        arguments, results = jax.tree.leaves(args), iter(program(*args))
        leaves = [next(results) if source is None else arguments[source] for source in sources]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return compute
