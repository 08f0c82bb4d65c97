"""Methods that choose among the parameters there are."""

from lowrank.errors import UserError
from lowrank.methods.method import Method


def full() -> Method:
    """Full fine-tuning: every parameter is trained."""
    return Method(train=(".*",))


def partial(layers: int = 2) -> Method:
    """Partial fine-tuning: the last `layers` blocks are trained; the backward pass stops below them."""
    if layers < 1:
        raise UserError(f"method.layers must be at least 1, not {layers}")
    return Method(model={"top_layers": layers}, train=("top/.*",))


def head() -> Method:
    """Linear probing: only the head is trained."""
    return Method(train=("head/.*",))


def bitfit() -> Method:
    """BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

    A decoder whose kernels have none (Llama, Mistral, Qwen) gets zero ones, on every kernel of attention and MLP.
    """
    return Method(model={"biases": True}, train=(r"(.*/)?bias",))
