"""Scores of predicted classes, from a confusion matrix. Shapes: N examples, C classes."""

import numpy as np

from lowrank.metrics import check_not_empty


def confusion(labels_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """Counts `[classes, classes]`, int64: row = true label, column = prediction."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(labels_N), np.asarray(predicted_N)), 1)
    return counts


def accuracy(counts_CxC: np.ndarray) -> float:
    """The fraction of correct predictions in a confusion matrix, in [0, 1]."""
    counts = np.asarray(counts_CxC, np.float64)
    return float(np.trace(counts) / check_not_empty(counts.sum()))


def macro_f1(counts_CxC: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN), averaged with equal weight over the classes that occur at all, in [0, 1].

    A class that is neither a true label nor a prediction has no F1 and is left out, as scikit-learn does.
    """
    counts = np.asarray(counts_CxC, np.float64)
    check_not_empty(counts.sum())
    either = counts.sum(0) + counts.sum(1)  # 2 TP + FP + FN
    occurs = either > 0
    return float(np.mean(2 * np.diag(counts)[occurs] / either[occurs]))
