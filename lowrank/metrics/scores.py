"""Scores of predictions against references: classification from a confusion matrix, text, perplexity."""

import math
import re
import string
from collections.abc import Sequence

import numpy as np
import sacrebleu

from lowrank.core.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")


def confusion(labels_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """Counts `[classes, classes]`, int64: row = true label, column = prediction."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(labels_N), np.asarray(predicted_N)), 1)
    return counts


def accuracy(counts_CxC: np.ndarray) -> float:
    """The fraction of correct predictions in a confusion matrix, in [0, 1]."""
    counts = np.asarray(counts_CxC, np.float64)
    return float(np.trace(counts) / _some(counts.sum()))


def macro_f1(counts_CxC: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN), averaged with equal weight over the classes that occur at all, in [0, 1].

    A class that is neither a true label nor a prediction has no F1 and is left out, as scikit-learn does.
    """
    counts = np.asarray(counts_CxC, np.float64)
    _some(counts.sum())
    either = counts.sum(0) + counts.sum(1)  # 2 TP + FP + FN
    occurs = either > 0
    return float(np.mean(2 * np.diag(counts)[occurs] / either[occurs]))


def normalize(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation, no a/an/the, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The fraction of predictions equal to their reference after `normalize`, in [0, 1]."""
    pairs = _pairs(predictions, references)
    return sum(normalize(p) == normalize(r) for p, r in pairs) / len(pairs)


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
        return math.exp(float(nll) / _some(float(tokens)))
    except OverflowError:
        return math.inf


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references")
    _some(len(references))
    return list(zip(predictions, references, strict=True))


def _some(count: float) -> float:
    if count <= 0:
        raise UserError("nothing to score: the evaluation set is empty")
    return count
