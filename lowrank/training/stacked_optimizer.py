"""An optimizer whose statistics are those of one matrix or vector, applied to each one of a stack alone."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank.core import tree
from lowrank.core.typing import PyTree


def per_matrix(plain: optax.GradientTransformation) -> optax.GradientTransformation:
    """`plain` for each layer's matrix or vector, and for each expert's, in place of the leaf that stacks them.

    Without it, a mean over a leaf, such as Adafactor's clip, mixes all layers. The state is that of `plain`, and its
    arrays of a stacked leaf have the leaf's stack axes first. Values that belong to no leaf, such as a count of the
    updates, stay single.
    """

    def axes(state: PyTree) -> PyTree:
        return optax.tree.map_params(
            plain, lambda x: x if _masked(x) else 0, state, transform_non_params=lambda _: None, is_leaf=_masked
        )

    def init(trained: PyTree) -> PyTree:
        stacks = _stacks(trained)

        def of(stack: jax.ShapeDtypeStruct) -> PyTree:
            part = _part(trained, stacks, stack)
            return _mapped(plain.init, stack.ndim, 0, axes(jax.eval_shape(plain.init, part)))(part)

        return _merged([of(stack) for stack in _distinct(stacks)])

    def update(gradient: PyTree, state: PyTree, trained: PyTree) -> tuple[PyTree, PyTree]:
        stacks = _stacks(trained)

        def of(stack: jax.ShapeDtypeStruct) -> tuple[PyTree, PyTree]:
            pick = lambda x, s: x if s == stack else optax.MaskedNode()  # noqa: E731
            own = optax.tree.map_params(plain, pick, state, stacks, is_leaf=_masked)
            step = _mapped(plain.update, stack.ndim, (0, axes(own), 0), (0, axes(own)))
            return step(_part(gradient, stacks, stack), own, _part(trained, stacks, stack))

        return _merged([of(stack) for stack in _distinct(stacks)])

    return optax.GradientTransformation(init, update)


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _stacks(trained: PyTree) -> PyTree:
    """A shape in the place of each leaf: that of its stack axes, `()` for a leaf that is not stacked."""
    return tree.map_named(lambda name, x: jax.ShapeDtypeStruct(x.shape[: tree.stack_depth(name)], bool), trained)


def _distinct(stacks: PyTree) -> list[jax.ShapeDtypeStruct]:
    """The stacks of a tree, each once; optax also asks for the state of a tree without leaves."""
    return list(dict.fromkeys(jax.tree.leaves(stacks))) or [jax.ShapeDtypeStruct((), bool)]


def _part(leaves: PyTree, stacks: PyTree, stack: jax.ShapeDtypeStruct) -> PyTree:
    return jax.tree.map(lambda x, s: x if s == stack else optax.MaskedNode(), leaves, stacks)


def _mapped(fn: Callable, depth: int, in_axes: Any, out_axes: Any) -> Callable:
    for _ in range(depth):
        fn = jax.vmap(fn, in_axes, out_axes)
    return fn


def _merged(parts: list[PyTree]) -> PyTree:
    """One tree of trees that hold disjoint leaves, with MaskedNode in place of the others'."""
    return jax.tree.map(lambda *xs: next((x for x in xs if not _masked(x)), xs[0]), *parts, is_leaf=_masked)
