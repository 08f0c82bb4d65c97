"""Scaled parallel adapters as a method."""

from lowrank.methods.method import Method
from lowrank.methods.parallel import parallel


def scaled_parallel(width: int = 64, activation: str = "relu", scale: float = 4.0, after: str = "mlp") -> Method:
    """Scaled parallel adapters, with the paper's scale of 4 (He et al. 2022, arXiv:2110.04366, section 4.6).

    Differs from the paper: the default width is 64, where the paper's adapters have 512.
    """
    return parallel(width, activation, scale, after)
