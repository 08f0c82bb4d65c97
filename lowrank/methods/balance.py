"""What keeps the experts of a mixture in use: a loss that goes into the gradient alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo, Bind, PyTree


def in_balance(kind: type, balance: float) -> Bind:
    """A `bind` that hands weights of `kind` the batch's mask and the loss's strength while training."""

    def bind(params: PyTree, batch: BatchInfo | None, rng: jax.Array | None) -> PyTree:
        if rng is None or batch is None or not balance:
            return params
        return mapped(params, kind, lambda name, w: _balanced(w, batch, balance))

    return bind


def check_share(name: str, count: int, experts: int, balance: float) -> None:
    """Raises UserError unless `count` of `experts` can be chosen and `balance` is a weight."""
    if not 1 <= count <= experts:
        raise UserError(f"method.{name}={count} is not in 1..{experts}, the number of experts")
    if balance < 0:
        raise UserError(f"method.balance must not be negative, not {balance}")


def mapped(params: PyTree, kind: type, fn: Any) -> PyTree:
    """`params` with `fn(name, w)` for every weight of `kind`."""
    return tree.map_named(lambda name, w: fn(name, w) if type(w) is kind else w, params, is_leaf=weight.is_weight)


def _balanced(w: Any, batch: BatchInfo, balance: float) -> Any:
    assert batch.weight is not None  # balance is a loss: it is bound in training only
    stack = w.shape[:-2]
    mask = (batch.segments > 0).astype(jnp.float32)
    strength = jnp.broadcast_to(balance * batch.weight, stack)
    return dataclasses.replace(w, mask=jnp.broadcast_to(mask, (*stack, *mask.shape)), strength=strength)
