"""The named streams of random keys of a run, which depend on nothing but the seed and, where it is given, the step.

A resumed run therefore draws exactly the numbers that an uninterrupted run draws.
"""

import enum

import jax


class Stream(enum.IntEnum):
    """The number that is folded into the key of the run's seed, one per stream."""

    CALIBRATE = 1  # a method's calibration by the data before the first step
    RESTART = 2  # a method's change of the parameters every n steps
    ROLLOUT = 3  # the texts that the model writes before a step


def attach_key(seed: int) -> jax.Array:
    """The key of a method's rules and shared leaves."""
    return jax.random.key(seed)


def calibrate_key(seed: int) -> jax.Array:
    """The key of `Hooks.calibrate`."""
    return jax.random.fold_in(jax.random.key(seed), Stream.CALIBRATE)


def restart_key(seed: int, step: int) -> jax.Array:
    """The key of `Hooks.every_n_steps` before step `step` (from 0)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Stream.RESTART), step)


def rollout_key(seed: int, step: int) -> jax.Array:
    """The key of the texts that are written before step `step` (from 0); each row folds its own index into it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Stream.ROLLOUT), step)


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of training step `step` (from 0); each microbatch folds its own index into it."""
    return jax.random.fold_in(jax.random.key(seed), step)
