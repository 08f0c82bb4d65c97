"""Scores of predictions against references: accuracy, F1, ROUGE, BLEU, exact match and perplexity."""

from lowrank.core.errors import UserError


def check_not_empty(count: float) -> float:
    """`count`, the number of scored items. Raises UserError where it is 0."""
    if count <= 0:
        raise UserError("the evaluation set is empty, so nothing can be scored: name a split with records")
    return count
