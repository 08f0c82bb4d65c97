"""How far training moves the columns of a kernel in length and in direction (Liu et al. 2024, arXiv:2402.09353).

For a kernel `[in, out]` with columns of lengths m and directions V, `dM = mean |m_t - m_0|` and
`dD = mean (1 - cos(V_t, V_0))` over its columns, and the slope is that of the regression of dM on dD over the layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.protocol.model import Model
from lowrank import pretrained
from lowrank.core.weight import materialize

KERNELS = ("q", "v")  # those that the paper shows


class Change(NamedTuple):
    """What training did to a kernel, `[layers]` each."""

    magnitude: np.ndarray
    direction: np.ndarray

    @property
    def slope(self) -> float:
        """The slope of the regression of dM on dD over the layers."""
        return float(np.polyfit(self.direction, self.magnitude, 1)[0])

    @property
    def correlation(self) -> float:
        """Pearson's correlation of dM and dD over the layers."""
        return float(np.corrcoef(self.direction, self.magnitude)[0, 1])


def decompose(before_LxIxO: np.ndarray, after_LxIxO: np.ndarray) -> Change:
    """The change of a stack of kernels, in float64."""
    before, after = (np.asarray(w, np.float64) for w in (before_LxIxO, after_LxIxO))
    m_0, m_t = (np.linalg.norm(w, axis=-2) for w in (before, after))
    cosine = np.sum(before * after, axis=-2) / (m_0 * m_t)
    return Change(np.mean(np.abs(m_t - m_0), axis=-1), np.mean(1 - cosine, axis=-1))


def changes(model: Model) -> Mapping[str, Change]:
    """The change of each kernel in `KERNELS` from the untrained model."""
    before = untrained_kernels(model.run.model.name)
    return {kernel: decompose(before[kernel], w) for kernel, w in attention_kernels(model.base.params).items()}


@functools.cache
def untrained_kernels(name: str) -> Mapping[str, np.ndarray]:
    """The kernels of a pretrained model."""
    return attention_kernels(pretrained.load(name).params)


def attention_kernels(params: Any) -> Mapping[str, np.ndarray]:
    """`{kernel: [layers, in, out]}` of the kernels in `KERNELS`."""
    return {kernel: np.asarray(materialize(params["layers"]["attn"][kernel]["kernel"])) for kernel in KERNELS}
