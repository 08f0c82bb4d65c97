import math

import numpy as np
import pytest
from nltk import edit_distance

from lowrank.core.errors import UserError
from lowrank.metrics import text
from tests.support.close import assert_close


def test_exact_match_ignores_case_punctuation_articles_and_spacing_as_squad_does():
    assert text.normalize("  The U.S.  an Apple-pie, a  b ") == "us applepie b"
    predictions = ["The Norman conquest!", "theatre", "42", ""]
    references = ["norman  Conquest", "atre", "43", "the"]
    assert text.exact_match(predictions, references) == 0.5


def test_rouge_equals_the_hand_count():
    # Reference 5 words, prediction 4, words in common 3 (ad, boost, profit), longest common subsequence 3, bigrams 0.
    score = text.rouge(["Ad firms boost profit"], ["ad sales boost Warner profit"])
    f = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    assert_close(score, {"rouge1": f, "rouge2": 0.0, "rougeL": f}, relative=1e-12)
    assert_close(text.rouge(["b a"], ["a b"])["rougeL"], 0.5, relative=1e-12)
    assert_close(text.rouge(["b a"], ["a b"])["rouge1"], 1.0, relative=1e-12)


def test_rouge_is_the_mean_over_examples_and_the_stemmer_is_a_choice():
    assert_close(text.rouge(["a b", "x"], ["a b", "y"])["rouge1"], 0.5, relative=1e-12)
    assert text.rouge(["profits"], ["profit"])["rouge1"] == 0.0
    assert text.rouge(["profits"], ["profit"], stemmer=True)["rouge1"] == 1.0


def test_bleu_equals_the_formula():
    prediction, reference = "the cat sat on the mat today", "the cat sat on a mat today again"
    # Clipped n-gram precisions 6/7, 4/6, 2/5, 1/4 and a brevity penalty for 7 words against 8.
    expected = 100 * math.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert_close(text.bleu([prediction], [reference]), expected, relative=1e-12)
    assert_close(text.bleu([reference], [reference]), 100.0, relative=1e-12)


def test_edit_distances_are_those_of_nltk():
    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b = ("".join(rng.choice(list("ab €"), rng.integers(0, 12))) for _ in range(2))
        assert text.edit_distance(a, b) == edit_distance(a, b)


def test_edit_similarity_is_a_mean_of_texts():
    assert_close(
        text.edit_similarity(["kitten", "", ""], ["sitting", "ab", ""]), (1 - 3 / 7 + 0 + 1) / 3, relative=1e-12
    )


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert_close(text.perplexity(10 * math.log(7), 10), 7.0, relative=1e-12)
    assert text.perplexity(1e6, 1) == math.inf
    assert math.isnan(text.perplexity(math.nan, 1))


@pytest.mark.parametrize(
    "score",
    [
        lambda: text.exact_match([], []),
        lambda: text.edit_similarity([], []),
        lambda: text.rouge([], []),
        lambda: text.bleu([], []),
        lambda: text.perplexity(0.0, 0),
    ],
)
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(UserError, match="evaluation set is empty"):
        score()


def test_unequal_numbers_of_predictions_and_references_are_an_error():
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        text.rouge(["a"], ["a", "b"])
