"""Leaves chosen by their names."""

from lowrank.core.errors import UserError
from lowrank.methods.method import Method


def chosen(leaves: str | tuple[str, ...] = r".*attn/(q|v)/kernel") -> Method:
    """Trains the leaves whose names `leaves`, one regex or several, match in full: what LoRA adapts, by default."""
    patterns = (leaves,) if isinstance(leaves, str) else tuple(leaves)
    if not all(patterns) or not patterns:
        raise UserError("method.leaves is empty: it names the leaves to train, such as '.*attn/q/kernel'")
    return Method(trainable=patterns)
