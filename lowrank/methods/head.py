"""Linear probing as a method: the head alone."""

from lowrank.methods.method import Method


def head() -> Method:
    """Linear probing: only the head is trained."""
    return Method(trainable=("head/.*",))
