"""The biases."""

from lowrank.methods.method import Method


def bitfit() -> Method:
    """BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

    A decoder whose kernels have none (Llama, Mistral, Qwen) gets zero ones, on every kernel of attention and MLP.
    """
    return Method(model_options={"biases": True}, trainable=(r"(.*/)?bias",))
