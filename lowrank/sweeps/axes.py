"""The axes of a study, and their combinations: each is a sequence of points, `{config key: value}`.

product(axis("optim.lr", [1e-4, 1e-3]), axis("method.rank", [1, 4]), seeds(3))                  # 12 points
chain(combine(axis("method.name", ["lora"]), axis("optim.lr", [1e-3])), axis("seed", [7]))      # one after another
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError

Point = Mapping[str, Any]
Points = tuple[Point, ...]
Distribution = Callable[[np.random.Generator], Any]
DIGITS = 4  # of a number drawn at random, so that tables and config files can spell it
TRIES = 1000  # draws in a row that only repeat points, after which a random search is found to be exhausted


def axis(key: str, values: Sequence[Any]) -> Points:
    """One point for each value of a config key, such as `optim.lr`, or of a whole group, such as `method`."""
    return tuple({key: value} for value in values)


def seeds(count: int, first: int = 0) -> Points:
    """The axis of the seeds `first`, `first + 1`, and so on."""
    return axis("seed", range(first, first + count))


def product(*points: Points) -> Points:
    """Every combination of the points of its arguments; the last argument varies fastest."""
    return tuple(_merge(combination) for combination in itertools.product(*points))


def combine(*points: Points) -> Points:
    """The first points of all arguments as one point, then the second ones, as `zip` does.

    Raises UserError for arguments of different lengths.
    """
    lengths = [len(each) for each in points]
    if len(set(lengths)) > 1:
        raise UserError(f"combine joins axes of one length, and these have {' and '.join(map(str, lengths))} points")
    return tuple(_merge(combination) for combination in zip(*points, strict=True))


def chain(*points: Points) -> Points:
    """The points of all arguments, one after another."""
    return tuple(itertools.chain(*points))


def random_points(distributions: Mapping[str, Distribution | Sequence[Any]], budget: int, seed: int = 0) -> Points:
    """`budget` different points that are drawn at random: `{key: distribution or the values to choose from}`.

    The same seed gives the same points, and a larger budget continues them. Raises UserError if there are fewer
    different points than the budget.
    """
    points: dict[str, Point] = {}
    generator, repeated = np.random.default_rng(seed), 0
    while len(points) < budget:
        point = {key: _draw(of, generator) for key, of in distributions.items()}
        repeated = 0 if repr(point) not in points else repeated + 1
        points[repr(point)] = point
        if repeated > TRIES:
            raise UserError(
                f"a random search of budget={budget} finds {len(points)} different points: lower the budget"
            )
    return tuple(points.values())


def uniform(low: float, high: float) -> Distribution:
    """Numbers between two bounds."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Positive numbers whose logarithm is uniform between those of two bounds, as for learning rates."""
    if not 0 < low <= high:
        raise UserError(f"log_uniform({low}, {high}) needs bounds with 0 < low <= high")
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def _draw(of: Distribution | Sequence[Any], generator: np.random.Generator) -> Any:
    return of(generator) if callable(of) else of[int(generator.integers(len(of)))]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")


def _merge(points: Sequence[Point]) -> Point:
    """One point of several. Raises UserError for a key that two of them set."""
    merged: dict[str, Any] = {}
    for point in points:
        for key, value in point.items():
            if key in merged:
                raise UserError(f"two axes set {key}: a point has one value for each key")
            merged[key] = value
    return merged
