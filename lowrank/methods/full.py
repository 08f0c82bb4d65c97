"""Full fine-tuning as a method: every parameter."""

from lowrank.methods.method import Method


def full() -> Method:
    """Full fine-tuning: every parameter is trained."""
    return Method(trainable=(".*",))
