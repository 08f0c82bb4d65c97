"""Optimizer states that a method resets, or lets rest, while the run's schedule goes on."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def choose(which: jax.Array, yes: PyTree, no: PyTree, schedule: PyTree) -> PyTree:
    """`yes` where `which` is true, else `no`, leaf by leaf; the place in the schedule is always that of `schedule`."""
    return jax.tree.map(
        lambda s, y, n: s if _in_schedule(s) else jnp.where(which, y, n), schedule, yes, no, is_leaf=_in_schedule
    )


def _in_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)
