"""The MAM adapter as a method: a prefix, and adapters beside the feed-forward layers."""

import dataclasses

from lowrank.methods.method import Method
from lowrank.methods.prefix import prefix
from lowrank.methods.scaled_parallel import scaled_parallel


def mam(length: int = 30, width: int = 64, scale: float = 4.0, reparam: bool = False, hidden: int = 512) -> Method:
    """MAM adapter: a prefix, and scaled parallel adapters beside the feed-forward layers (arXiv:2110.04366).

    Differs from the paper: by default the prefix is learned as it is, where the authors' code computes it by an MLP of
    800 hidden units (`reparam`, `hidden`), and the adapters have a width of 64, where the paper's have 512.
    """
    first, second = prefix(length, reparam, hidden), scaled_parallel(width, scale=scale)
    options = {**first.model_options, **second.model_options}
    return dataclasses.replace(first, model_options=options, trainable=(*first.trainable, *second.trainable))
