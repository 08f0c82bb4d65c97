"""Denoising: the worked example, counts, documents that come back, UL2's mixture, draws that repeat, and refusals."""

import itertools
import json

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.data import DataConfig, make_loader
from lowrank.data.denoise import MIXTURES, build_denoise, corrupt, counts
from lowrank.data.transforms import NONE, TRANSFORMS
from tests.data.conftest import Bytes

LENGTH = 96
TEXT = "The minister said on Monday that café shares rose, at 5 € each, after the first half of the year."


class Numbered(Bytes):
    """A tokenizer with T5's sentinels at 500, 501, ... and UL2's modes at 900, 901 and 902."""

    MODES = ("[NLU]", "[S2S]", "[NLG]")

    def __init__(self, sentinels=100):
        super().__init__()
        names = [f"<extra_id_{i}>" for i in range(sentinels)]
        self.added = dict(zip(names, range(500, 500 + sentinels), strict=True))
        self.added |= dict(zip(self.MODES, range(900, 903), strict=True))

    def encode(self, text):
        return [self.added[text]] if text in self.added else super().encode(text)

    def token(self, i):
        return next((name for name, added in self.added.items() if added == i), None) or super().token(i)


@pytest.fixture(scope="module")
def numbered():
    return Numbered()


def sequence(tokenizer, text=TEXT):
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
    ones = np.ones(len(ids) - 1, np.float32)
    return {"tokens": ids[:-1], "targets": ids[1:], "weights": ones, "prompt": np.arange(len(ones)) < 1}


def test_the_worked_example():
    """`ABCDEFGHIJKL` at a share of .25 and a mean of 1.5, kept 4 and 5, lost 1 and 2."""
    assert [int(n) for n in counts(np.array(12), ("R", 1.5, 0.25))] == [3, 2]
    left, gone = corrupt(list("ABCDEFGHIJKL"), (4, 5), (1, 2), "012")
    assert ("".join(left), "".join(gone)) == ("ABCD0FGHIJ1", "0E1KL2")


def test_the_counts_are_those_of_t5():
    lost, spans = counts(np.array([512, 2, 7]), ("R", 3, 0.15))
    assert lost.tolist() == [77, 1, 1]
    assert spans.tolist() == [26, 1, 1]
    assert [int(n) for n in counts(np.array(10), ("X", 1, 0.9))] == [9, 1]  # no more spans than kept tokens
    assert [int(n) for n in counts(np.array(512), ("S", 0, 0.25))] == [128, 1]


def mask_of(left, gone, sentinels):
    """The document that input and target stand for, and the lost places: every span is put back in its place."""
    spans, current = {}, None
    for token in gone:
        current = token if token in sentinels else current
        spans.setdefault(current, []).extend([] if token in sentinels else [token])
    whole = [(i, False) if i not in sentinels else None for i in left]
    out = []
    for token, item in zip(left, whole, strict=True):
        out += [item] if item else [(i, True) for i in spans[token]]
    return [i for i, _ in out], np.array([lost for _, lost in out])


@pytest.mark.parametrize("denoisers", MIXTURES)
def test_documents_come_back_and_the_target_alone_is_learned(numbered, denoisers):
    lose = build_denoise({"denoisers": denoisers}, numbered, LENGTH)
    plain, sentinels = sequence(numbered), range(500, 600)
    body = [plain["tokens"][0], *plain["targets"][:-1]]
    drawn = set()
    for record in range(80):
        made = lose(dict(plain), (0, 0, record, 0))
        assert len(made["tokens"]) <= LENGTH
        first = int(np.argmax(made["weights"]))
        ids = [int(made["tokens"][0]), *made["targets"].tolist()]
        assert set(made["weights"][first:].tolist()) == {1.0}
        assert made["prompt"].tolist() == [i < first + 1 for i in range(len(made["prompt"]))]
        assert ids[-1] == numbered.eos_id
        mode, left, gone = ids[0], ids[1 : first + 1], ids[first + 1 : -1]
        assert mode in range(900, 903)
        found, lost = mask_of(left, gone, sentinels)
        assert found == body
        assert not lost[0]
        assert gone[0] == 500
        spans = gone[-1] - 500
        assert len(left) == len(body) - lost.sum() + spans
        assert len(gone) == lost.sum() + spans + 1
        drawn.add((mode, int(lost.sum()), spans))
        if mode == 901:
            assert lost.tolist() == [i >= len(body) - round(len(body) / 4) for i in range(len(body))]
    assert len(drawn) == len(MIXTURES[denoisers])  # each has counts of its own


def test_the_shares_of_sequences_and_of_denoisers(numbered):
    lose, plain = build_denoise({"rate": 0.7}, numbered, LENGTH), sequence(numbered)
    made = [lose(plain, (0, 0, record, 0)) for record in range(700)]
    modes = [int(m["tokens"][0]) for m in made if m is not plain]
    assert abs(len(modes) / 700 - 0.7) < 0.06
    for mode, share in ((900, 2 / 7), (901, 1 / 7), (902, 4 / 7)):
        assert abs(modes.count(mode) / len(modes) - share) < 0.07


def test_lost_spans_lie_anywhere(numbered):
    """The chance that a token is lost is the share, but near the ends, of which the first is kept, the last lost."""
    lose = build_denoise({"denoisers": (("R", 2.0, 0.3),)}, numbered, 256)
    plain = sequence(numbered)
    lost = []
    for record in range(400):
        made = lose(dict(plain), (1, 0, record, 0))
        first = int(np.argmax(made["weights"]))
        ids = [int(made["tokens"][0]), *made["targets"].tolist()]
        lost.append(mask_of(ids[1 : first + 1], ids[first + 1 : -1], range(500, 600))[1])
    chance = np.mean(lost, axis=0)
    assert np.all(np.abs(chance[5:-5] - 0.3) < 0.12)
    assert chance[0] == 0
    assert chance[-1] == 1


def test_rows_that_are_full_still_fit(write, numbered):
    kept = {"template": "{text}", "seq_len": 64, "batch_size": 4, "packing": False}
    config = DataConfig(source=write([{"text": TEXT * 5}] * 3), denoise={}, epochs=6, **kept)
    loader = make_loader(config, numbered)
    filled = [batch["segments"][batch["valid"] == 1].sum(-1) for batch in loader]
    assert max(map(max, filled)) == 64  # the denoiser with the most sentinels fills a row


@pytest.mark.parametrize("before", [2, 20])
def test_a_saved_state_continues_with_the_same_spans(write, numbered, before):
    rng = np.random.default_rng(5)
    texts = [{"text": " ".join(rng.choice(TEXT.split(), rng.integers(5, 60)))} for _ in range(30)]
    config = DataConfig(source=write(texts), template="{text}", seq_len=48, batch_size=4, seed=3, denoise={})
    loader = make_loader(config, numbered)
    for _ in range(before):
        next(loader)
    fresh = make_loader(config, numbered)
    fresh.set_state(json.loads(json.dumps(loader.get_state())))
    for a, b in itertools.islice(zip(loader, fresh, strict=True), 5):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_sentinels_are_names_of_any_tokens(tokenizer):
    names = ("[CLS]", "[SEP]", "<|im_start|>", "<pad>", "<s>", "<|im_end|>")
    lose = build_denoise({"denoisers": "t5", "sentinels": names}, tokenizer, 40)
    assert [tokenizer.token(i) for i in lose.sentinels] == list(names)
    assert lose.modes == ()
    numbered = build_denoise({"sentinels": ("</s>", "<extra_id_{}>"), "denoisers": "t5"}, Numbered(30), 40)
    assert numbered.sentinels == (1, *range(500, 530))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -0.5}, r"data.denoise.rate=-0.5 is not in \[0, 1\]"),
        ({"denoisers": "ul3"}, r"unknown data.denoise.denoisers 'ul3' \(did you mean 'ul2'"),
        ({"denoisers": ()}, "data.denoise.denoisers is empty"),
        ({"denoisers": (("Q", 3, 0.15),)}, "unknown mode of data.denoise.denoisers 'Q'"),
        ({"denoisers": (("R", 3, 1.0),)}, r"\('R', 3, 1.0\) needs a mean length of at least 1, a share in \(0, 1\)"),
        ({"denoisers": (("R", 3),)}, "data.denoise.denoisers must be"),
        ({"modes": ("[CLS]", "[SEP]")}, "data.denoise.modes must be three different tokens"),
        ({"sentinels": ("[CLS]", "[CLS]")}, "data.denoise.sentinels must be different tokens"),
        ({}, "the vocabulary has no tokens of UL2's modes: name three"),
        ({"denoisers": "t5"}, "data.denoise has 0 sentinels, and data.seq_len=96 may need 5"),
        ({"denoisers": "t5", "sentinels": ("<x>",)}, "data.denoise.sentinels: '<x>' is not one token"),
        ({"denoisers": "t5", "sentinels": ("<x{}>",)}, "data.denoise.sentinels: '<x{}>' is not one token"),
        ({"modes": ("[CLS]", "[SEP]", "<m>")}, "data.denoise.modes: '<m>' is not one token"),
    ],
)
def test_wrong_options_and_tokens_are_refused(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        build_denoise(options, tokenizer, LENGTH)


def test_a_mode_is_no_sentinel_and_a_short_row_has_no_room(numbered):
    with pytest.raises(UserError, match=r"'\[NLU\]' is a mode and a sentinel"):
        build_denoise({"sentinels": ("[NLU]", "<extra_id_{}>")}, numbered, LENGTH)
    with pytest.raises(UserError, match=r"data\.seq_len=5 has no room for what data.denoise adds"):
        build_denoise({}, numbered, 5)


def test_a_text_that_spells_a_sentinel_is_named(write, tokenizer):
    names = ("[CLS]", "[SEP]", "<|im_start|>", "<pad>", "<s>", "<|im_end|>")
    group = {"denoisers": "t5", "sentinels": names}
    config = DataConfig(source=write([{"text": "one [SEP] two"}]), template="{text}", seq_len=40, denoise=group)
    with pytest.raises(UserError, match=r"records.jsonl:1: the text holds '\[SEP\]', which data.denoise takes for a"):
        make_loader(config, tokenizer)


def test_two_transforms_and_records_with_answers_are_refused(write, numbered):
    both = DataConfig(source=write([{"text": TEXT}]), template="{text}", denoise={}, infill={})
    with pytest.raises(UserError, match=r"data\.denoise and data\.infill both change documents"):
        make_loader(both, numbered)
    answers = DataConfig(source=write([{"prompt": "a", "completion": "b"}]), denoise={})
    with pytest.raises(UserError, match=r"data\.denoise changes documents"):
        make_loader(answers, numbered)


def test_each_transform_is_a_field_of_the_group():
    assert set(TRANSFORMS) <= set(DataConfig.__dataclass_fields__)
    assert {getattr(DataConfig(**NONE), name) for name in TRANSFORMS} == {None}
