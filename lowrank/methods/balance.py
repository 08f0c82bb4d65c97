"""The balance loss, a regularizer that keeps all experts of a mixture in use."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo, PyTree, Sums
from lowrank.methods.method import Regularizer, TotalLoss


def balance_regularizer(kind: type, balance: float) -> Regularizer | None:
    """The regularizer that gives each weight of `kind` the mask of the batch and the strength of the balance loss.

    The weight itself adds the balance loss, to the gradient alone. Returns None for `balance=0`.
    """

    def regularized(loss: TotalLoss, params: PyTree, batch: BatchInfo, scale: jax.Array) -> Sums:
        masked = map_forms(params, kind, lambda name, w: _with_mask(w, batch))
        return loss(balanced(masked, kind, balance * scale, batch))

    return regularized if balance else None


def balanced(params: PyTree, kind: type, factor: jax.Array, batch: BatchInfo) -> PyTree:
    """`params` with the strength of the balance loss, `factor` times the batch's weight, in all weights of `kind`."""
    assert batch.weight is not None  # a batch to train on has one
    strength = factor * batch.weight
    spread = lambda name, w: jnp.broadcast_to(strength, w.shape[:-2])  # noqa: E731
    return map_forms(params, kind, lambda name, w: dataclasses.replace(w, strength=spread(name, w)))


def check_routing(name: str, count: int, experts: int, balance: float) -> None:
    """Raises UserError unless `count` of `experts` can be chosen and `balance` can be the factor of a loss."""
    if not 1 <= count <= experts:
        raise UserError(f"method.{name}={count} is not in 1..{experts}, the number of experts")
    check_balance(balance)


def check_balance(balance: float) -> None:
    """Raises UserError for a factor of the balance loss that is negative."""
    if balance < 0:
        raise UserError(f"method.balance must not be negative, not {balance}")


def map_forms(params: PyTree, kind: type, fn: Any) -> PyTree:
    """`params` with `fn(name, w)` for every weight of `kind`."""
    return tree.map_named(lambda name, w: fn(name, w) if type(w) is kind else w, params, is_leaf=weight.is_weight)


def _with_mask(w: Any, batch: BatchInfo) -> Any:
    mask = (batch.segments > 0).astype(jnp.float32)
    return dataclasses.replace(w, mask=jnp.broadcast_to(mask, (*w.shape[:-2], *mask.shape)))
