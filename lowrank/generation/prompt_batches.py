"""Prompts of different lengths in one batch, padded to a few lengths, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np


def padded(longest: int, limit: int) -> int:
    """The number of positions of a batch whose longest prompt has `longest` tokens, for a model with `limit`."""
    return max(longest, min(bucket(longest), limit))


def right_pad(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens [rows, length], lengths [rows])`, int32: prompts with zeros behind them."""
    tokens = np.zeros((len(ids), length), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in ids], np.int32)


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of a quarter of the power of two below it, or of 16: 4 sizes per doubling."""
    step = max(16, 2 ** (max(length - 1, 1).bit_length() - 1) // 4)
    return -(-length // step) * step
