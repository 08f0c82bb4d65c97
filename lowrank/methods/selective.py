"""Methods that choose among the parameters there are."""

from lowrank.errors import UserError
from lowrank.methods.method import Method


def full() -> Method:
    """Full fine-tuning: every parameter is trained."""
    return Method(train=(".*",))


def partial(layers: int = 2, first: bool = False) -> Method:
    """Partial fine-tuning: the last `layers` blocks are trained, or the first.

    The backward pass stops below the last ones; above the first ones it makes no gradients of kernels.
    """
    if layers < 1:
        raise UserError(f"method.layers must be at least 1, not {layers}")
    if first:
        return Method(model={"top_layers": -layers}, train=("layers/.*",))
    return Method(model={"top_layers": layers}, train=("top/.*",))


def head() -> Method:
    """Linear probing: only the head is trained."""
    return Method(train=("head/.*",))


def norm() -> Method:
    """Norm tuning: scales and biases of all norms (Qi et al. 2022, arXiv:2205.03037; Zhao et al. 2024, 2312.11420)."""
    return Method(train=(r"(.*/)?\w*norm/(scale|bias)",))


def chosen(leaves: str | tuple[str, ...] = r".*attn/(q|v)/kernel") -> Method:
    """Trains the leaves whose names `leaves`, one regex or several, match in full: what LoRA adapts, by default."""
    patterns = (leaves,) if isinstance(leaves, str) else tuple(leaves)
    if not all(patterns) or not patterns:
        raise UserError("method.leaves is empty: it names the leaves to train, such as '.*attn/q/kernel'")
    return Method(train=patterns)


def bitfit() -> Method:
    """BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

    A decoder whose kernels have none (Llama, Mistral, Qwen) gets zero ones, on every kernel of attention and MLP.
    """
    return Method(model={"biases": True}, train=(r"(.*/)?bias",))
