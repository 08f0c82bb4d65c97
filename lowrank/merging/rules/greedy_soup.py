"""The greedy soup: a model joins the mean where that does not lower the held-out score.

Wortsman et al. 2022, arXiv:2203.05482: the models are tried from the best to the worst.
"""

from collections.abc import Callable

from lowrank.merging.rule import Rule
from lowrank.merging.rules.uniform_soup import coefficients, merge


def select(count: int, score: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The models of the soup, out of `count`; `score(models)` is that of the mean of these, and higher is better."""
    alone = [score((i,)) for i in range(count)]
    first, *rest = sorted(range(count), key=lambda i: -alone[i])
    soup: tuple[int, ...] = (first,)
    best = alone[first]
    for i in rest:
        value = score((*soup, i))
        if value >= best:
            soup, best = (*soup, i), value
    return soup


GREEDY_SOUP = Rule(merge=merge, options={}, task_coefficients=coefficients, select=select)
