"""Norm tuning as a method: the scales and biases of the norms."""

from lowrank.methods.method import Method


def norm() -> Method:
    """Norm tuning: scales and biases of all norms (Qi et al. 2022, arXiv:2205.03037; Zhao et al. 2024, 2312.11420)."""
    return Method(trainable=(r"(.*/)?\w*norm/(scale|bias)",))
