"""Gaps in held-out documents: their rule, what surrounds them, and refusals."""

import pytest

from lowrank.core.errors import UserError
from lowrank.data.gaps import find_gaps

MARKS = ("[CLS]", "[SEP]", "<|im_start|>")
TEXTS = [
    f"The minister of {i} said:\n\nshares rose, at {i} €.\nThe half was strong.\nThe end came {i}." for i in range(40)
]


def gaps(tokenizer, texts=TEXTS, length=90, **rule):
    return find_gaps(tokenizer, texts, length=length, sentinels=MARKS, **rule)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, special=True)


@pytest.mark.parametrize("cuts", ["characters", "tokens"])
@pytest.mark.parametrize("order", ["psm", "spm", "spm_apart"])
@pytest.mark.parametrize("middle", ["span", "line", "lines"])
def test_the_parts_of_a_document_join(tokenizer, middle, order, cuts):
    for gap, text in zip(gaps(tokenizer, middle=middle, order=order, cuts=cuts, longest=20), TEXTS, strict=True):
        asked = decoded(tokenizer, gap.asked)
        prefix = decoded(tokenizer, gap.prefix)
        marks = {"psm": (asked.split("[SEP]")[-1], 0), "spm": (asked.split("[SEP]")[-1], 1)}
        suffix = (
            marks[order][0].split("<|im_start|>")[0] if order in marks else asked.split("[SEP]")[1].split("[CLS]")[0]
        )
        assert text.startswith(prefix)
        assert text == prefix + decoded(tokenizer, gap.middle) + suffix
        assert gap.text == decoded(tokenizer, gap.middle)


def test_the_rule_of_each_kind(tokenizer):
    spans = [gap.text for gap in gaps(tokenizer, longest=20)]
    assert all(0 < len(text) <= 20 and text.strip() for text in spans)
    assert len({len(text) for text in spans}) > 10
    lines = [gap.text for gap in gaps(tokenizer, middle="line")]
    assert set(lines) <= {line for text in TEXTS for line in text.split("\n")[2:]}
    assert len({text[:7] for text in lines}) == 3
    counts = {gap.text.count("\n") + 1 for gap in gaps(tokenizer, middle="lines")}
    assert counts == {2, 3}


def test_all_models_fill_the_same_gaps_and_a_document_does_not_move_those_of_others(tokenizer):
    both = gaps(tokenizer), gaps(tokenizer, order="spm")
    assert [gap.text for gap in both[0]] == [gap.text for gap in both[1]]
    assert gaps(tokenizer, ["another text", *TEXTS[1:]])[1:] == both[0][1:]


def test_a_long_document_has_its_gap_at_the_start_and_fits(tokenizer):
    for gap in gaps(tokenizer, ["\n".join(TEXTS)] * 30, length=60):
        assert len(gap.asked) + len(gap.middle) <= 61


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"middle": "word"}, "unknown middle of a gap 'word'"),
        (TEXTS, {"order": "mps"}, "unknown order of a gap 'mps'"),
        (["one line", "another"], {"middle": "line"}, "none of the documents has a gap of the kind 'line'"),
        (["a", "b [SEP] c"], {}, r"document 1: the text holds '\[SEP\]'"),
    ],
)
def test_what_has_no_gap_is_refused(tokenizer, texts, options, message):
    with pytest.raises(UserError, match=message):
        gaps(tokenizer, texts, **options)
