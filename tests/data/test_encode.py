"""Encoding: what is predicted with which weight, and that only the long text is ever cut."""

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.data.chat import Chat
from lowrank.data.encode import encode_pieces, fit, shorten
from lowrank.data.labeled import LabeledEncoder
from lowrank.data.language import LanguageEncoder
from lowrank.data.render import Plain
from lowrank.data.templates import TEMPLATES

ARTICLE = "The minister said on Monday that shares rose after a strong first half. " * 12
NEWS = {"text": ARTICLE, "title": "Shares rose on Monday", "label": "b"}


def language(tokenizer, name="headline", length=64, prompt_weight=0.1):
    return LanguageEncoder(Plain(TEMPLATES[name]), tokenizer, length, prompt_weight)


def short(text="A short text.", title="Title"):
    return {"text": text, "title": title}


def test_targets_are_the_next_tokens_and_the_answer_with_its_end_weighs_one(tokenizer):
    (sequence,), cut = language(tokenizer)(short(), "r")
    prompt, answer = tokenizer.encode("A short text.\n\nHeadline:"), tokenizer.encode(" Title")
    ids = [*prompt, *answer, tokenizer.eos_id]
    assert not cut
    assert sequence["tokens"].tolist() == ids[:-1]
    assert sequence["targets"].tolist() == ids[1:]
    expected = [0.1] * (len(prompt) - 1) + [1.0] * (len(answer) + 1)
    np.testing.assert_array_equal(sequence["weights"], np.float32(expected))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_prompt_weights_zero_and_one_are_exact(tokenizer, weight):
    (sequence,), _ = language(tokenizer, prompt_weight=weight)(short(), "r")
    answer = len(tokenizer.encode(" Title")) + 1
    assert sequence["weights"].sum() == (answer if weight == 0 else len(sequence["weights"]))
    assert set(sequence["weights"].tolist()) == {weight, 1.0}
    prompt = len(tokenizer.encode("A short text.\n\nHeadline:"))  # whatever its tokens weigh
    assert sequence["prompt"].tolist() == [True] * prompt + [False] * (answer - 1)


def test_a_start_token_is_put_first_once_where_the_tokenizer_has_one(tokenizer):
    class Starting(type(tokenizer)):
        def encode_special(self, text):
            return [self.bos_id, *self.encode(text)]

    starting = Starting()
    (sequence,), _ = language(starting)(short(), "r")
    assert sequence["tokens"][0] == starting.bos_id
    (again,), _ = language(starting)(short("<s>A short text."), "r")
    np.testing.assert_array_equal(again["tokens"], sequence["tokens"])
    np.testing.assert_array_equal(again["weights"], sequence["weights"])


def test_a_long_article_is_cut_at_a_word_and_the_answer_kept(tokenizer):
    (sequence,), cut = language(tokenizer)(NEWS, "r")
    text = tokenizer.decode(sequence["tokens"].tolist())
    assert cut
    assert 55 < len(sequence["tokens"]) <= 64
    body, _, title = text.partition("\n\nHeadline:")
    assert title == " Shares rose on Monday"
    assert ARTICLE.startswith(body + " ")
    assert sequence["targets"][-1] == tokenizer.eos_id


@pytest.mark.parametrize("length", range(24, 60, 5))
def test_whatever_the_length_the_sequence_fits_and_ends_with_the_answer(tokenizer, length):
    (sequence,), _ = language(tokenizer, length=length)(NEWS, "r")
    answer = [*tokenizer.encode(" Shares rose on Monday"), tokenizer.eos_id]
    assert len(sequence["tokens"]) <= length
    assert sequence["targets"].tolist()[-len(answer) :] == answer


def test_what_fits_exactly_is_not_cut(tokenizer):
    (whole,), _ = language(tokenizer, length=1000)(short(), "r")
    size = len(whole["tokens"])
    assert not language(tokenizer, length=size)(short(), "r")[1]
    assert language(tokenizer, length=size - 1)(short(), "r")[1]


def test_an_answer_that_does_not_fit_is_named_not_cut(tokenizer):
    with pytest.raises(UserError, match=r"f:9: \d+ tokens without the text that may be cut; at most 9 fit"):
        language(tokenizer, length=8)(NEWS, "f:9")


def test_a_document_is_cut_into_pieces_that_predict_each_token_once(tokenizer):
    pieces, cut = language(tokenizer, "text", length=10)({"text": ARTICLE}, "r")
    ids = [*tokenizer.encode(ARTICLE), tokenizer.eos_id]
    assert not cut
    assert np.concatenate([p["tokens"] for p in pieces]).tolist() == ids[:-1]
    assert np.concatenate([p["targets"] for p in pieces]).tolist() == ids[1:]
    assert {len(p["tokens"]) for p in pieces[:-1]} == {10}
    assert all((p["weights"] == 1).all() for p in pieces)


def test_a_conversation_learns_its_answers_and_gets_no_second_end(tokenizer):
    encode = LanguageEncoder(Chat(tokenizer, TEMPLATES["chat"]), tokenizer, 64, 0.0)
    (sequence,), _ = encode({"prompt": "Why?", "completion": " Because."}, "r")
    assert sequence["targets"][sequence["weights"] == 1].tolist() == tokenizer.encode("Because.<|im_end|>\n")
    assert tokenizer.eos_id not in sequence["targets"]


def test_a_long_prompt_in_a_conversation_is_cut_inside_its_turn(tokenizer):
    encode = LanguageEncoder(Chat(tokenizer, TEMPLATES["chat"]), tokenizer, 64, 0.0)
    (sequence,), cut = encode({"prompt": ARTICLE, "completion": "Because."}, "r")
    text = tokenizer._bpe.decode(sequence["tokens"].tolist(), skip_special_tokens=False)
    assert cut
    assert text.startswith("<|im_start|>user\nThe minister")
    assert "<|im_end|>\n<|im_start|>assistant\nBecause." in text


def test_the_prompt_for_generation_leaves_room_for_the_answer(tokenizer):
    text, ids = language(tokenizer).prompt(NEWS, "r", reserve=16)
    assert ids == tokenizer.encode(text)
    assert 40 < len(ids) <= 48
    assert text.endswith("\n\nHeadline:")


def test_the_prompt_for_generation_is_the_training_prompt_when_nothing_is_cut(tokenizer):
    text, ids = language(tokenizer).prompt(short(), "r", reserve=16)
    (sequence,), _ = language(tokenizer)(short(), "r")
    assert text == "A short text.\n\nHeadline:"
    assert sequence["tokens"][: len(ids)].tolist() == ids


def labelled(tokenizer, length=32):
    return LabeledEncoder(Plain(TEMPLATES["text"]), tokenizer, length, "label", ("a", "b"))


def test_a_classified_text_has_its_special_tokens_even_when_cut(tokenizer):
    (sequence,), cut = labelled(tokenizer)(NEWS, "r")
    assert cut
    assert (sequence["tokens"][0], sequence["tokens"][-1]) == (5, 6)
    assert 25 < len(sequence["tokens"]) <= 32
    assert sequence["labels"] == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "f:4: the record has no field 'label'"),
        ({"text": "x", "label": "bb"}, r"f:4: unknown label 'bb' \(did you mean 'b'\?\); known: a, b"),
        ({"text": " ", "label": "b"}, "f:4: empty text"),
    ],
)
def test_a_record_that_cannot_be_classified_is_named(tokenizer, record, message):
    with pytest.raises(UserError, match=message):
        labelled(tokenizer)(record, "f:4")


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("one two three", 99, "one two three"),
        ("one two three", 9, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 2, "on"),
        ("x" * 99, 50, "x" * 50),
        ("one " + "x" * 99, 60, "one " + "x" * 56),
    ],
)
def test_a_cut_ends_with_a_whole_word_unless_it_is_very_long(text, size, expected):
    assert shorten(text, size) == expected


def test_fitting_ends_even_when_the_offsets_give_no_length_away(tokenizer):
    class Blank(type(tokenizer)):
        def encode_offsets(self, text):
            ids, _ = super().encode_offsets(text)
            return ids, [(0, 10_000)] * len(ids)

    blank = Blank()

    def build(text):
        ids = blank.encode(ARTICLE if text is None else text)
        return ids, [False] * len(ids)

    (ids, _), cut = fit(build, blank, lambda: ARTICLE, 20, "r")
    assert len(ids) <= 20
    assert ARTICLE.startswith(cut)


def test_pieces_are_encoded_as_one_text_and_a_token_of_both_is_learned(tokenizer):
    ids, offsets = tokenizer.encode_offsets(ARTICLE)
    at, (begin, end) = next((i, pair) for i, pair in enumerate(offsets) if pair[1] - pair[0] > 2)
    found, learned = encode_pieces(tokenizer, [(ARTICLE[: begin + 1], False), (ARTICLE[begin + 1 : end], True)])
    assert found == tokenizer.encode(ARTICLE[:end])
    assert found[at] == ids[at]
    assert learned == [False] * at + [True]


def test_every_byte_of_a_learned_letter_is_learned(tokenizer):
    ids, learned = encode_pieces(tokenizer, [("a ", False), ("\U0001f600", True), ("b", False)])
    assert sum(learned) == 4
    assert len(ids) == 7
