"""A method that trains the leaves of the given names."""

from lowrank.core.errors import UserError
from lowrank.methods.method import Method


def chosen(leaves: str | tuple[str, ...] = r".*attn/(q|v|qkv)/kernel") -> Method:
    """Trains the leaves whose full names match `leaves`, one regex or several; by default, LoRA's targets."""
    patterns = (leaves,) if isinstance(leaves, str) else tuple(leaves)
    if not all(patterns) or not patterns:
        raise UserError("method.leaves is empty: give the names of the leaves to train, such as '.*attn/q/kernel'")
    return Method(trainable=patterns)
