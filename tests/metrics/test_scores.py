import math

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.metrics import scores
from tests.support.close import assert_close


def test_macro_f1_and_accuracy_equal_the_float64_formula_from_precision_and_recall():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    f1 = []
    for c in range(4):
        hit = float(np.sum((labels == c) & (predicted == c)))
        precision, recall = hit / np.sum(predicted == c), hit / np.sum(labels == c)
        f1.append(2 * precision * recall / (precision + recall))
    counts = scores.confusion(labels, predicted, 4)
    assert counts.dtype == np.int64
    assert counts.sum() == 200
    assert_close(scores.macro_f1(counts), np.mean(f1), relative=1e-12)
    assert_close(scores.accuracy(counts), np.mean(labels == predicted), relative=1e-12)


def test_macro_f1_weighs_classes_alike_and_leaves_out_those_that_never_occur():
    # Class 0: 8 of 8 right and 1 false alarm, F1 = 16/17; class 1: 1 of 2, F1 = 2/3; class 2 occurs nowhere.
    counts = scores.confusion([0] * 8 + [1, 1], [0] * 8 + [1, 0], 3)
    assert_close(scores.macro_f1(counts), (16 / 17 + 2 / 3) / 2, relative=1e-12)
    # A class that is only ever predicted counts, with F1 = 0.
    assert_close(scores.macro_f1(scores.confusion([0, 0], [0, 2], 3)), (2 / 3 + 0) / 2, relative=1e-12)


def test_confusion_rows_are_labels_and_columns_are_predictions():
    assert scores.confusion([0, 0, 1], [1, 1, 1], 2).tolist() == [[0, 2], [0, 1]]


def test_exact_match_ignores_case_punctuation_articles_and_spacing_as_squad_does():
    assert scores.normalize("  The U.S.  an Apple-pie, a  b ") == "us applepie b"
    predictions = ["The Norman conquest!", "theatre", "42", ""]
    references = ["norman  Conquest", "atre", "43", "the"]
    assert scores.exact_match(predictions, references) == 0.5


def test_rouge_equals_the_hand_count():
    # Reference 5 words, prediction 4, words in common 3 (ad, boost, profit), longest common subsequence 3, bigrams 0.
    score = scores.rouge(["Ad firms boost profit"], ["ad sales boost Warner profit"])
    f = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    assert_close(score, {"rouge1": f, "rouge2": 0.0, "rougeL": f}, relative=1e-12)
    assert_close(scores.rouge(["b a"], ["a b"])["rougeL"], 0.5, relative=1e-12)
    assert_close(scores.rouge(["b a"], ["a b"])["rouge1"], 1.0, relative=1e-12)


def test_rouge_is_the_mean_over_examples_and_the_stemmer_is_a_choice():
    assert_close(scores.rouge(["a b", "x"], ["a b", "y"])["rouge1"], 0.5, relative=1e-12)
    assert scores.rouge(["profits"], ["profit"])["rouge1"] == 0.0
    assert scores.rouge(["profits"], ["profit"], stemmer=True)["rouge1"] == 1.0


def test_bleu_equals_the_formula():
    prediction, reference = "the cat sat on the mat today", "the cat sat on a mat today again"
    # Clipped n-gram precisions 6/7, 4/6, 2/5, 1/4 and a brevity penalty for 7 words against 8.
    expected = 100 * math.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert_close(scores.bleu([prediction], [reference]), expected, relative=1e-12)
    assert_close(scores.bleu([reference], [reference]), 100.0, relative=1e-12)


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert_close(scores.perplexity(10 * math.log(7), 10), 7.0, relative=1e-12)
    assert scores.perplexity(1e6, 1) == math.inf
    assert math.isnan(scores.perplexity(math.nan, 1))


@pytest.mark.parametrize(
    "score",
    [
        lambda: scores.accuracy(np.zeros((2, 2))),
        lambda: scores.macro_f1(np.zeros((2, 2))),
        lambda: scores.exact_match([], []),
        lambda: scores.rouge([], []),
        lambda: scores.bleu([], []),
        lambda: scores.perplexity(0.0, 0),
    ],
)
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(UserError, match="nothing to score"):
        score()


def test_unequal_numbers_of_predictions_and_references_are_an_error():
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        scores.rouge(["a"], ["a", "b"])
