"""The barrier along the line between two models: by how much its worst point scores below the line of the ends' scores.

Frankle et al. 2020, arXiv:1912.05671. Models that are aligned have a low one, and can be averaged.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lowrank.core.errors import UserError, plural

Params = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Line:
    """The scores of models on a line, at the shares `places` of the second one."""

    places: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The largest shortfall below the straight line between the ends' scores; 0 where there is none."""
        first, last = self.scores[0], self.scores[-1]
        expected = [(1 - t) * first + t * last for t in self.places]
        return max(0.0, *(e - s for e, s in zip(expected, self.scores, strict=True)))


def line(a: Params, b: Params, score: Callable[[dict[str, np.ndarray]], float], points: int = 11) -> Line:
    """The scores of `points` models from `a` to `b`, which are arrays by name; higher is better, as minus a loss is.

    Raises UserError for models with different tensors, and for fewer than 3 points.
    """
    if points < 3:
        raise UserError(f"a line of {plural(points, 'point')} has no middle: take at least 3")
    if wrong := sorted(a.keys() ^ b.keys()) or [n for n, x in a.items() if x.shape != b[n].shape]:
        raise UserError(f"the ends of a line differ in the tensor {wrong[0]!r}: align models of one shape")
    places = tuple(i / (points - 1) for i in range(points))
    return Line(places, tuple(float(score({n: (1 - t) * x + t * b[n] for n, x in a.items()})) for t in places))
