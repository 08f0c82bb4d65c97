"""Scores of texts: ROUGE, BLEU and exact match against references, and perplexity."""

import math
import re
import string
from collections.abc import Sequence

import numpy as np
import sacrebleu

from lowrank.core.errors import UserError
from lowrank.metrics import check_not_empty

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL` and `exact_match` in [0, 1], `bleu` in [0, 100], and `examples`.

    Raises UserError where there are no texts, or the two lists differ in length.
    """
    return {
        **rouge(predictions, references),
        "bleu": bleu(predictions, references),
        "exact_match": exact_match(predictions, references),
        "examples": float(len(references)),
    }


def normalize(text: str) -> str:
    """SQuAD's normalization (Rajpurkar et al. 2016): lower case, no punctuation, no a/an/the, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The fraction of predictions equal to their reference after `normalize`, in [0, 1]."""
    pairs = _pairs(predictions, references)
    return sum(normalize(p) == normalize(r) for p, r in pairs) / len(pairs)


def edit_similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean of 1 - edit distance / length of the longer text, in [0, 1]; two empty texts are alike."""
    pairs = _pairs(predictions, references)
    return float(np.mean([1 - edit_distance(p, r) / max(len(p), len(r), 1) for p, r in pairs]))


def edit_distance(a: str, b: str) -> int:
    """The insertions, deletions and replacements of characters that lead from one text to the other (Levenshtein)."""
    steps = np.arange(len(b) + 1)
    letters, row = np.array(list(b), dtype=str), steps
    for i, letter in enumerate(a, 1):
        least = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        row = np.minimum.accumulate(least - steps) + steps  # insertions, one after another
    return int(row[-1])


def rouge(predictions: Sequence[str], references: Sequence[str], stemmer: bool = False) -> dict[str, float]:
    """Mean F-measures `rouge1`, `rouge2`, `rougeL` in [0, 1], by the rouge-score package (Lin 2004).

    Its tokenizer lower-cases and keeps runs of a-z and 0-9 only: text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # brings SciPy's statistics: a second that few commands need

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scores = [scorer.score(reference, prediction) for prediction, reference in _pairs(predictions, references)]
    return {name: float(np.mean([s[name].fmeasure for s in scores])) for name in ROUGE}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in [0, 100] by sacrebleu, with its default 13a tokenizer and exponential smoothing (Post 2018)."""
    _pairs(predictions, references)
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def perplexity(nll: float, tokens: float) -> float:
    """`exp(nll / tokens)` from a summed negative log-likelihood in nats; infinite where that overflows."""
    try:
        return math.exp(float(nll) / check_not_empty(float(tokens)))
    except OverflowError:
        return math.inf


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references")
    check_not_empty(len(references))
    return list(zip(predictions, references, strict=True))
