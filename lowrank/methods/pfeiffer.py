"""Pfeiffer adapters as a method: one adapter per block; see `lowrank.methods.bottleneck` for the shapes."""

from lowrank.methods.bottleneck import bottleneck_method
from lowrank.methods.method import Method


def pfeiffer(width: int = 64, activation: str = "relu", scale: float = 1.0) -> Method:
    """One adapter per block, on the residual sum after the feed-forward layer (Pfeiffer et al. 2020, arXiv:2005.00247).

    `A(x) = scale * up(act(down(x)))`. For a layer that reads h and returns y, the next residual stream of a post-norm
    model is `norm(h + y + A(norm(h + y)))`, with one norm twice, and that of a pre-norm model `h + y + A(h + y)`.
    In Gemma, whose sublayers end in a norm, it is `h + norm(y + A(h + norm(y)))`.

    Differs from the paper: up is 0 at first, so that the model is unchanged, where AdapterHub, the authors' code, draws
    both kernels with a standard deviation of 0.02. The paper has no pre-norm model: the place is AdapterHub's in Llama.
    """
    return bottleneck_method(width, activation, scale, "mlp", on_sum=True)
