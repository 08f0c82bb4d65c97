"""Perplexity of long texts by a sliding window, each token scored once, and by how many tokens its prediction sees.

Shapes: N tokens of a document, n predictions.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank.core.errors import UserError
from lowrank.evaluation.long_context.reader import Reader
from lowrank.metrics.text import perplexity


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The predictions of documents in order: the loss of each in nats, and how many tokens it sees."""

    nll: np.ndarray  # float64 [n]
    seen: np.ndarray  # int64 [n]

    @property
    def perplexity(self) -> float:
        """`exp` of the mean loss over the tokens. (A mean of windows would give short ones too much weight.)"""
        return perplexity(float(self.nll.sum()), len(self.nll))


def windows(predictions: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """`(start, first, stop)` of each window over the predictions of a document, which are one fewer than its tokens.

    A window reads the tokens `start` to `stop`, at most `window` of them, and those from `first` on have their
    predictions scored: the ones that no window before it has scored.
    """
    first = start = 0
    while first < predictions:
        stop = min(start + window, predictions)
        yield start, first, stop
        first, start = stop, start + stride


def token_scores(reader: Reader, documents: Sequence[np.ndarray], window: int, stride: int) -> TokenScores:
    """The scores of the tokens of documents, `[N]` each, but their first ones, once each.

    A window of `window` tokens moves on by `stride`: the predictions of the first one see 1 to `window` tokens, those
    of the others `window - stride + 1` to `window`. With a stride of 1 each sees all that the window can hold; with
    that of the window, texts are cut. Raises UserError for a stride that leaves out tokens.
    """
    if not 1 <= stride <= window:
        raise UserError(f"a stride of {stride} is not in 1..{window}, the tokens of the window: it would skip some")
    places = [(ids, place) for ids in documents for place in windows(len(ids) - 1, window, stride)]
    rows = [ids[start : stop + 1] for ids, (start, _, stop) in places]
    nll, seen = list[np.ndarray](), list[np.ndarray]()
    for (_, (start, first, stop)), of_row in zip(places, reader.token_nll(rows, window), strict=True):
        nll.append(of_row[first - start :].astype(np.float64))
        seen.append(np.arange(first, stop) - start + 1)
    if not nll:
        raise UserError("the documents hold no token to predict: name a split with texts")
    return TokenScores(np.concatenate(nll), np.concatenate(seen))


def by_position(scores: TokenScores, bins: int) -> list[dict[str, float]]:
    """Perplexity by the number of tokens that a prediction sees, in `bins` of equal width up to the largest.

    Each row has `first` and `last` of these numbers, the `tokens` scored, `nll` and `perplexity`. Bins without a token
    are left out.
    """
    edges = np.unique(np.round(np.linspace(0, scores.seen.max(), bins + 1)).astype(np.int64))
    rows = []
    for before, last in itertools.pairwise(edges):
        of = scores.nll[(scores.seen > before) & (scores.seen <= last)]
        if len(of):
            row = {"first": int(before) + 1, "last": int(last), "tokens": len(of), "nll": float(of.mean())}
            rows.append(row | {"perplexity": perplexity(float(of.sum()), len(of))})
    return rows
