"""The named streams of random keys of a run. Each depends on the seed, and on the step where one is given, alone.

A resumed run therefore draws exactly the numbers that an uninterrupted one draws.
"""

import enum

import jax


class Stream(enum.IntEnum):
    """The number that is folded into the key of the run's seed for a stream of its own."""

    CALIBRATE = 1  # a method's look at the data before the first step
    RESTART = 2  # a method's change of the parameters every n steps


def attach_key(seed: int) -> jax.Array:
    """The key that a method's rules and shared leaves are drawn with."""
    return jax.random.key(seed)


def calibrate_key(seed: int) -> jax.Array:
    """The key of `Hooks.calibrate`."""
    return jax.random.fold_in(jax.random.key(seed), Stream.CALIBRATE)


def restart_key(seed: int, step: int) -> jax.Array:
    """The key of `Hooks.every_n_steps` before step `step` (from 0)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Stream.RESTART), step)


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of training step `step` (from 0); each microbatch folds its own index into it."""
    return jax.random.fold_in(jax.random.key(seed), step)
