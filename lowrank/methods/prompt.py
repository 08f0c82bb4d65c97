"""Prompt tuning: learned tokens before the text."""

from lowrank.errors import UserError
from lowrank.methods.method import Method


def prompt(length: int = 20) -> Method:
    """Prompt tuning: `length` virtual tokens before the text (Lester et al. 2021, arXiv:2104.08691)."""
    if length < 1:
        raise UserError(f"method.length must be at least 1, not {length}")
    return Method(model={"num_prompt": length}, train=("prompt/.*",))
