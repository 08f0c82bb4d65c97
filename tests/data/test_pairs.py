"""Pairs of answers and labeled answers: text and turns, prompts that are given or shared, cuts, and what is refused."""

import numpy as np
import pytest

from lowrank.core.errors import TooLong, UserError
from lowrank.data import JUDGED, PAIRS, SCORED_PAIRS, DataConfig, make_loader, read_examples

PROMPT, CHOSEN, REJECTED = "Who rose on Monday?", " The shares rose.", " Nobody at all rose."
TEXT = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("The shares.", "The club."))
TURNS = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
JUDGMENTS = [{"prompt": PROMPT, "completion": CHOSEN, "label": i % 2 == 0} for i in range(4)]


def first_row(records, tokenizer, write, row_format=PAIRS, **settings):
    config = DataConfig(**{"source": write(records), "seq_len": 96, "batch_size": 2, "shuffle": False, **settings})
    return {name: x[0] for name, x in next(make_loader(config, tokenizer, row_format=row_format)).items()}


def texts(row, tokenizer):
    """`[(prompt, learned text)]` of the members of a row."""
    shown = []
    for tokens, targets, weights in zip(row["tokens"], row["targets"], row["weights"], strict=True):
        start = int(np.argmax(weights == 1))
        ids = targets[weights == 1]
        shown.append((tokenizer.decode(tokens[: start + 1].tolist(), special=True), tokenizer.decode(ids.tolist())))
    return shown


def test_a_pair_is_one_row_of_two_members_with_the_number_of_its_record(tokenizer, write):
    config = DataConfig(source=write([TEXT] * 6), seq_len=96, batch_size=3)
    loader = make_loader(config, tokenizer, row_format=PAIRS)
    batch = next(loader)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == loader.shapes
    assert batch["tokens"].shape == (3, 2, 96)
    numbers = [row for _ in range(3) for row in next(loader)["record"].tolist()]
    assert all(a == b for a, b in numbers)
    assert {a for a, _ in numbers} == set(range(6))


def test_the_answers_alone_weigh_and_each_has_its_end(tokenizer, write):
    row = first_row([TEXT], tokenizer, write, prompt_loss_weight=0.5)
    assert texts(row, tokenizer) == [(PROMPT, CHOSEN), (PROMPT, REJECTED)]
    assert set(np.unique(row["weights"])) == {0.0, 1.0}
    for targets, weights in zip(row["targets"], row["weights"], strict=True):
        assert targets[weights == 1][-1] == tokenizer.eos_id
        assert weights[len(weights) - np.argmax(weights[::-1] == 1) :].sum() == 0
    assert (row["tokens"][:, 0] != tokenizer.eos_id).all()


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},  # what both start with; its last space is theirs
        {"question": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    ],
)
def test_a_prompt_is_what_answers_share_or_what_a_template_writes(record, tokenizer, write):
    template = {"template": "{question}"} if "question" in record else {}
    explicit = first_row([TEXT], tokenizer, write)
    found = first_row([record], tokenizer, write, **template)
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(found[name], explicit[name])


@pytest.mark.parametrize("prompt", [{}, {"prompt": PROMPT}])  # a text beside turns that hold it already
def test_turns_that_both_answers_start_with_are_the_prompt(prompt, tokenizer, write):
    explicit = first_row([TURNS], tokenizer, write)
    found = first_row([{**prompt, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}], tokenizer, write)
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(found[name], explicit[name])
    assert texts(explicit, tokenizer)[0][1].strip() == "The shares."


def test_the_prompt_is_cut_once_for_the_longer_answer(tokenizer, write):
    long = {**TEXT, "prompt": "shares rose after a strong first half " * 9, "rejected": REJECTED * 4}
    row = first_row([long], tokenizer, write, seq_len=80)
    (prompt, chosen), (same, rejected) = texts(row, tokenizer)
    assert (prompt, chosen, rejected) == (same, CHOSEN, REJECTED * 4)
    assert long["prompt"].startswith(prompt)
    assert 70 < row["segments"][1].sum() <= 80
    assert row["segments"][0].sum() < row["segments"][1].sum()


def test_a_conversation_loses_the_same_old_turns_for_both_answers(tokenizer, write):
    talk = [{"role": role, "content": f"{role} says much"} for _ in range(4) for role in ("user", "assistant")]
    row = first_row([{**TURNS, "prompt": [*talk, ASKED[1]]}], tokenizer, write, seq_len=80)
    (prompt, _), (same, _) = texts(row, tokenizer)
    assert prompt == same
    assert prompt.count("much") < 8


def test_a_model_of_rewards_reads_whole_sequences_and_a_margin(tokenizer, write):
    row = first_row([{**TEXT, "margin": 0.5}], tokenizer, write, row_format=SCORED_PAIRS)
    assert row["margin"].tolist() == [0.5, 0.5]
    for tokens, segments in zip(row["tokens"], row["segments"], strict=True):
        assert tokens[segments == 1][-1] == tokenizer.eos_id
    assert first_row([TEXT], tokenizer, write, row_format=SCORED_PAIRS)["margin"].tolist() == [0.0, 0.0]


def test_a_text_is_generated_from_the_prompt_and_compared_with_the_chosen_answer(tokenizer, write):
    config = DataConfig(source=write([TEXT]), seq_len=96)
    [example] = read_examples(config, tokenizer, reserve=8, row_format=PAIRS)
    assert (example["prompt"], example["completion"]) == (PROMPT, CHOSEN.strip())


def test_labeled_answers_are_rows_of_their_own(tokenizer, write):
    config = DataConfig(source=write(JUDGMENTS), seq_len=96, batch_size=2, shuffle=False)
    loader = make_loader(config, tokenizer, row_format=JUDGED)
    batch = next(loader)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == loader.shapes
    assert batch["desirable"].tolist() == [1, 0]
    assert (loader.stats["desirable"], loader.stats["undesirable"]) == (2, 2)
    assert (batch["weights"] == 1).any(axis=1).all()


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([{**TEXT, "rejected": CHOSEN}], r"jsonl:1: chosen and rejected are the same answer"),
        ([{**TURNS, "rejected": GOOD}], "chosen and rejected are the same answer"),
        ([{**TEXT, "rejected": " "}], "rejected: empty completion"),
        ([TEXT, {**TEXT, "chosen": ""}], r"jsonl:2: chosen: empty completion"),
        ([{**TURNS, "chosen": [{"role": "assistant", "content": ""}]}], "chosen: .*empty completion"),
        ([{**TURNS, "chosen": "The shares."}], "must both be text, or both be turns"),
        ([{"chosen": "Yes.", "rejected": "No."}], "start with nothing in common"),
        ([{"prompt": PROMPT, "chosen": CHOSEN, "reject": REJECTED}], "the field 'rejected' is missing .*'reject'"),
        ([{"prompt": PROMPT, "completion": CHOSEN}], "holds no pairs: the field 'chosen' is missing"),
        ([TEXT, {"prompt": PROMPT, "chosen": CHOSEN}], r"jsonl:2: the record has no field 'rejected'"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(records, text, tokenizer, write):
    with pytest.raises(UserError, match=text):
        first_row(records, tokenizer, write)


def test_a_prompt_or_an_answer_that_fills_the_length_is_refused_or_left_out(tokenizer, write):
    full = {**TEXT, "rejected": REJECTED * 30}
    fixed = {"question": "rose? " * 90, "text": "", "chosen": CHOSEN, "rejected": REJECTED}
    for record, settings in ((full, {}), (fixed, {"template": "{question}{text}"})):
        with pytest.raises(TooLong, match=r"jsonl:1: \d+ tokens without the text that may be cut; at most 97 fit"):
            first_row([record], tokenizer, write, **settings)
    row = first_row([full, TEXT], tokenizer, write, too_long="drop")
    assert row["record"].tolist() == [1, 1]


@pytest.mark.parametrize("template", ["headline", "messages", "text"])
def test_a_template_must_write_the_answer(template, tokenizer, write):
    record = {**TEXT, "text": "a", "title": "b", "messages": ASKED}
    with pytest.raises(UserError, match=f"data.template={template}"):
        first_row([record], tokenizer, write, template=template)


@pytest.mark.parametrize("margin", ["wide", True])
def test_a_margin_must_be_a_number(margin, tokenizer, write):
    with pytest.raises(UserError, match="margin must be a finite number"):
        first_row([{**TEXT, "margin": margin}], tokenizer, write, row_format=SCORED_PAIRS)


@pytest.mark.parametrize(
    ("records", "settings", "text"),
    [
        ([{**JUDGMENTS[0], "label": "good"}], {}, "jsonl:1: label must be true or false, not 'good'"),
        ([{**JUDGMENTS[0], "label": 1}], {}, "label must be true or false, not 1"),
        (JUDGMENTS[::2], {}, "every answer is desirable"),
        (JUDGMENTS[1::2], {}, "every answer is undesirable"),
        (JUDGMENTS, {"batch_size": 1}, "data.batch_size=1: .* set it to 2 or more"),
        ([TEXT], {}, "holds no labeled answers: the field 'label' is missing"),
        ([{**JUDGMENTS[0], "completion": ""}, *JUDGMENTS], {}, "empty completion"),
    ],
)
def test_labeled_answers_that_cannot_be_used_are_refused(records, settings, text, tokenizer, write):
    with pytest.raises(UserError, match=text):
        first_row(records, tokenizer, write, row_format=JUDGED, **settings)
