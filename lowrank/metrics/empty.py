"""The check that there is anything to score."""

from lowrank.core.errors import UserError


def check_not_empty(count: float) -> float:
    """`count`, the number of scored items. Raises UserError where it is 0."""
    if count <= 0:
        raise UserError("there is nothing to score: the evaluation set is empty; name a split with records")
    return count
