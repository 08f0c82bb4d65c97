"""BitFit as a method: the biases."""

from lowrank.methods.method import Method


def bitfit() -> Method:
    """BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

    Differs from the paper: its models have biases. A decoder without them (Llama, Mistral, Qwen) gets zero biases on
    every kernel of the attention and of the MLP.
    """
    return Method(model_options={"biases": True}, trainable=(r"(.*/)?bias",))
