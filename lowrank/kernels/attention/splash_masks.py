"""The masks of splash, which tell that all or none of a block's scores count without a look at each score.

The kernel's tables of blocks are made in Python, which visits each block of a row four times: those of a row of 131072
tokens are 65536, and a comparison of all their scores takes minutes.
"""

import math
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash


class CausalMask(splash.CausalMask):
    """Each token sees itself and the tokens before it."""

    def __getitem__(self, index: Any) -> np.ndarray:
        same = _value_of_all(self, index, 0, math.inf)
        return super().__getitem__(index) if same is None else same


class LocalMask(splash.LocalMask):
    """Each token sees the tokens of a window."""

    def __getitem__(self, index: Any) -> np.ndarray:
        before, after = self.window_size
        same = _value_of_all(
            self, index, -math.inf if after is None else -after, math.inf if before is None else before
        )
        return super().__getitem__(index) if same is None else same


def _value_of_all(mask: Any, index: Any, least: float, greatest: float) -> np.ndarray | None:
    """`[1, 1]` in place of a block whose entries are equal, else None; queries see keys `least` to `greatest` before.

    The queries of a block count up.
    """
    queries, keys = mask.q_sequence[index[0]], range(mask.shape[1])[index[1]]
    low, high = queries[0] - keys[-1], queries[-1] - keys[0]
    if least <= low and high <= greatest:
        return ALL
    return NONE if high < least or greatest < low else None


ALL, NONE = np.ones((1, 1), bool), np.zeros((1, 1), bool)
