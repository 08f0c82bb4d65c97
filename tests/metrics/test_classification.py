import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.metrics.classification import accuracy, confusion, macro_f1
from tests.support.close import assert_close


def test_macro_f1_and_accuracy_equal_the_float64_formula_from_precision_and_recall():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    f1 = []
    for c in range(4):
        hit = float(np.sum((labels == c) & (predicted == c)))
        precision, recall = hit / np.sum(predicted == c), hit / np.sum(labels == c)
        f1.append(2 * precision * recall / (precision + recall))
    counts = confusion(labels, predicted, 4)
    assert counts.dtype == np.int64
    assert counts.sum() == 200
    assert_close(macro_f1(counts), np.mean(f1), relative=1e-12)
    assert_close(accuracy(counts), np.mean(labels == predicted), relative=1e-12)


def test_macro_f1_weighs_classes_alike_and_leaves_out_those_that_never_occur():
    # Class 0: 8 of 8 right and 1 false alarm, F1 = 16/17; class 1: 1 of 2, F1 = 2/3; class 2 occurs nowhere.
    counts = confusion([0] * 8 + [1, 1], [0] * 8 + [1, 0], 3)
    assert_close(macro_f1(counts), (16 / 17 + 2 / 3) / 2, relative=1e-12)
    # A class that is only ever predicted counts, with F1 = 0.
    assert_close(macro_f1(confusion([0, 0], [0, 2], 3)), (2 / 3 + 0) / 2, relative=1e-12)


def test_confusion_rows_are_labels_and_columns_are_predictions():
    assert confusion([0, 0, 1], [1, 1, 1], 2).tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize("score", [accuracy, macro_f1])
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(UserError, match="evaluation set is empty"):
        score(np.zeros((2, 2)))
