"""Infilling: the three orders, cuts that lose nothing, draws that a resumed run repeats, and refusals."""

import itertools
import json

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.data import DataConfig, make_loader
from lowrank.data.infill import ORDERS, SENTINELS, build_infill

MARKS = ("[CLS]", "[SEP]", "<|im_start|>")
TEXT = "The minister said that café shares rose, at 5 € each, after the first half."
LENGTH = 127


def infill(tokenizer, length=LENGTH, **options):
    return build_infill({"sentinels": MARKS, **options}, tokenizer, length)


def sequence(tokenizer, text=TEXT):
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
    ones = np.ones(len(ids) - 1, np.float32)
    return {"tokens": ids[:-1], "targets": ids[1:], "weights": ones, "prompt": np.arange(len(ones)) < 1}


def text_of(tokenizer, made):
    return tokenizer.decode([made["tokens"][0], *made["targets"]], special=True)


def test_the_orders_are_the_worked_ones():
    """The parts of `abcdefgh` cut at 3 and 5, with P, S and M for the sentinels."""
    made = {name: "".join([*order(list("abc"), list("fgh"), "PSM"), *"de"]) for name, order in ORDERS.items()}
    assert made == {"psm": "PabcSfghMde", "spm": "PSfghMabcde", "spm_apart": "SfghPabcMde"}


PATTERNS = {  # what stands between the sentinels -> (prefix, suffix and middle)
    "psm": lambda s: (s.split("[SEP]")[0][5:], *s.split("[SEP]")[1].split("<|im_start|>")),
    "spm_apart": lambda s: (
        s.split("[CLS]")[1].split("<|im_start|>")[0],
        s.split("[CLS]")[0][5:],
        s.split("<|im_start|>")[1],
    ),
    "spm": lambda s: (s.split("<|im_start|>")[1], s.split("<|im_start|>")[0][10:], ""),
}


@pytest.mark.parametrize("cuts", ["characters", "tokens"])
@pytest.mark.parametrize("order", ORDERS)
def test_no_character_is_lost_and_the_middle_ends(tokenizer, order, cuts):
    options = {"spm": 0.0} if order == "psm" else {"spm": 1.0, "order": order}
    move, seen = infill(tokenizer, rate=1.0, cuts=cuts, **options), set()
    for record in range(60):
        text = text_of(tokenizer, move(sequence(tokenizer), (0, 0, record, 0)))
        assert text.endswith("</s>")
        prefix, suffix, middle = PATTERNS[order](text.removesuffix("</s>"))
        cut_character = cuts == "tokens" and "\ufffd" in text
        assert cut_character or prefix + middle + suffix == TEXT
        seen.add(text)
    assert len(seen) > 20


def test_rates_are_the_shares_of_sequences_and_of_orders(tokenizer):
    move, plain = infill(tokenizer, rate=0.6, spm=0.25), sequence(tokenizer)
    made = [move(plain, (0, 0, record, 0)) for record in range(600)]
    moved = [text_of(tokenizer, m) for m in made if m is not plain]
    assert abs(len(moved) / 600 - 0.6) < 0.07
    assert abs(np.mean([text.startswith("[CLS][SEP]") for text in moved]) - 0.25) < 0.07


def test_the_middle_alone_is_learned_where_it_is_asked_for(tokenizer):
    made = infill(tokenizer, rate=1.0, spm=0.0, learned="middle")(sequence(tokenizer), (0, 0, 3, 0))
    middle = text_of(tokenizer, made).split("<|im_start|>")[1]
    assert tokenizer.decode(made["targets"][made["weights"] == 1].tolist(), special=True) == middle
    assert set(made["weights"].tolist()) == {0.0, 1.0}
    everything = infill(tokenizer, rate=1.0)(sequence(tokenizer), (0, 0, 3, 0))
    assert everything["weights"].tolist() == [1.0] * len(everything["targets"])


def test_what_does_not_fit_loses_the_end_of_its_suffix(tokenizer):
    plain = sequence(tokenizer)
    room = len(plain["tokens"]) + 3  # as many as cuts between tokens need
    for record in range(40):
        made = infill(tokenizer, length=room - 5, rate=1.0, spm=0.0)(plain, (0, 0, record, 0))
        assert made is plain or len(made["tokens"]) <= room - 5
    assert len(infill(tokenizer, room, rate=1.0, cuts="tokens")(plain, (0, 0, 1, 0))["tokens"]) == room


@pytest.fixture
def config(write):
    rng = np.random.default_rng(5)
    words = TEXT.split()
    texts = [{"text": " ".join(rng.choice(words, rng.integers(5, 60)))} for _ in range(30)]
    group = {"rate": 0.8, "sentinels": MARKS}
    return DataConfig(source=write(texts), template="{text}", seq_len=48, batch_size=4, seed=3, infill=group)


@pytest.mark.parametrize("before", [3, 30])
def test_a_saved_state_continues_with_the_same_cuts(config, tokenizer, before):
    loader = make_loader(config, tokenizer)
    for _ in range(before):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    fresh = make_loader(config, tokenizer)
    fresh.set_state(state)
    for a, b in itertools.islice(zip(loader, fresh, strict=True), 6):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_each_epoch_cuts_a_document_elsewhere(write, tokenizer):
    group = {"rate": 1.0, "sentinels": MARKS}
    kept = {"template": "{text}", "seq_len": 96, "batch_size": 1, "packing": False, "shuffle": False, "epochs": 3}
    loader = make_loader(DataConfig(source=write([{"text": TEXT}]), infill=group, **kept), tokenizer)
    assert len({batch["tokens"].tobytes() for batch in loader}) == 3


def test_the_sentinels_of_a_model_that_infills_are_found(tokenizer):
    class Coder(type(tokenizer)):
        def encode(self, text):
            return [90 + SENTINELS[2].index(text)] if text in SENTINELS[2] else super().encode(text)

        def token(self, i):
            return SENTINELS[2][i - 90] if 90 <= i < 93 else super().token(i)

    assert build_infill({}, Coder(), LENGTH).ids == (90, 91, 92)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"data.infill.rate=1.5 is not in \[0, 1\]"),
        ({"cuts": "chars"}, r"unknown data.infill.cuts 'chars' \(did you mean 'characters'"),
        ({"order": "psm"}, "unknown data.infill.order 'psm'"),
        ({"rat": 0.5}, r"data.infill.rat.* \(did you mean 'data.infill.rate'"),
        ({"sentinels": ("[CLS]", "[CLS]", "[SEP]")}, "must be three different tokens"),
        ({"sentinels": ("[CLS]", "[SEP]", "<mid>")}, "'<mid>' is not one token of the vocabulary"),
        ({"sentinels": ()}, "the vocabulary has no sentinels of infilling: name three of its tokens"),
    ],
)
def test_wrong_options_and_sentinels_are_refused(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        infill(tokenizer, **options)


def test_a_text_that_spells_a_sentinel_is_named(write, tokenizer):
    source = write([{"text": "a good text"}, {"text": "a text with [SEP] in it"}])
    config = DataConfig(source=source, template="{text}", seq_len=48, infill={"sentinels": MARKS})
    with pytest.raises(UserError, match=r"records.jsonl.*2.*the text holds '\[SEP\]', which data.infill takes for"):
        make_loader(config, tokenizer)


def test_records_with_answers_are_refused(write, tokenizer):
    config = DataConfig(source=write([{"prompt": "a", "completion": "b"}]), seq_len=48, infill={"sentinels": MARKS})
    with pytest.raises(UserError, match=r"data\.infill changes documents"):
        make_loader(config, tokenizer)
