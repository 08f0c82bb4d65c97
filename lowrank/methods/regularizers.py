"""Regularizers of the parameters alone: a penalty beside the loss that is trained on, and not reported in it."""

from collections.abc import Callable

import jax

from lowrank.core.typing import BatchInfo, PyTree, Sums
from lowrank.methods.method import Regularizer, TotalLoss


def penalty_regularizer(penalty: Callable[[PyTree], jax.Array], factor: float) -> Regularizer | None:
    """The regularizer that adds the gradient of `factor * penalty(bound params)` to that of the mean loss.

    `penalty` returns a float32 scalar. None for `factor=0`.
    """

    def regularized(loss: TotalLoss, params: PyTree, batch: BatchInfo, scale: jax.Array) -> Sums:
        del batch
        sums = loss(params)  # before the penalty: the order decides how gradients are rounded
        term = scale * factor * penalty(params)
        return sums._replace(total=sums.total + sums.weight * (term - jax.lax.stop_gradient(term)))

    return regularized if factor else None
