"""Prompts of different lengths in one batch, padded on the left to a few lengths, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np


def padded(longest: int, limit: int) -> int:
    """The number of positions of a batch whose longest prompt has `longest` tokens, for a model with `limit`."""
    return max(longest, min(bucket(longest), limit))


def left_pad(ids: Sequence[Sequence[int]], pad_id: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens, segments)`, int32 `[rows, length]`: prompts padded on the left to a `bucket`, or to `limit` if less."""
    length = padded(max(len(row) for row in ids), limit)
    tokens = np.full((len(ids), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, length - len(row) :] = row
        segments[i, length - len(row) :] = 1
    return tokens, segments


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of a quarter of the power of two below it, or of 16: 4 sizes per doubling."""
    step = max(16, 2 ** (max(length - 1, 1).bit_length() - 1) // 4)
    return -(-length // step) * step
