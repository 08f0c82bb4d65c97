"""Partial fine-tuning as a method: the last blocks, or the first ones."""

from lowrank.core.errors import UserError
from lowrank.methods.method import Method


def partial(layers: int = 2, first: bool = False) -> Method:
    """Partial fine-tuning: the last `layers` blocks are trained, or the first ones.

    The backward pass stops below the last blocks; above the first blocks it computes no gradients of kernels.
    """
    if layers < 1:
        raise UserError(f"method.layers must be at least 1, not {layers}")
    if first:
        return Method(model_options={"top_layers": -layers}, trainable=("layers/.*",))
    return Method(model_options={"top_layers": layers}, trainable=("top/.*",))
