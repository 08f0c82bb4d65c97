"""The loader: exact continuation, one order for any number of hosts, and bad input refused before training."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.data import LABELED, LANGUAGE, DataConfig, examples, make_loader, read_examples
from lowrank.data.file_source import FileSource

N = 90
RNG = np.random.default_rng(7)
WORDS = ["the", "minister", "said", "that", "shares", "rose", "after", "a", "strong", "first", "half", "club", "chief"]
PAIRS = [
    {"prompt": " ".join(RNG.choice(WORDS, RNG.integers(2, 40))) + " =>", "completion": f" answer {i}", "label": i % 3}
    for i in range(N)
]


@pytest.fixture
def config(write):
    return DataConfig(source=write(PAIRS), seq_len=48, batch_size=4, seed=3)


def replace(config, **changes):
    return dataclasses.replace(config, **changes)


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


KINDS = {
    "packed": {},
    "padded": {"packing": False},
    "in order": {"shuffle": False, "epochs": 2},
    "without a thread": {"prefetch": 0},
    "documents": {"template": "{prompt}", "seq_len": 12},
    "held out": {"holdout": 0.2},
    "held out at first": {"holdout": 0.2, "holdout_batches": 3},
    "labeled": {"template": "{prompt}"},
}


def loader_of(kind, config, tokenizer):
    row_format = LABELED if kind == "labeled" else LANGUAGE
    return make_loader(replace(config, **KINDS[kind]), tokenizer, row_format=row_format)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_saved_state_continues_exactly(config, tokenizer, kind, before):
    loader = loader_of(kind, config, tokenizer)
    take(loader, before)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 20)
    loader.set_state(state)
    assert_same(take(loader, 20), expected)
    fresh = loader_of(kind, config, tokenizer)
    fresh.set_state(state)
    assert_same(take(fresh, 20), expected)


def test_reading_the_state_changes_nothing(config, tokenizer):
    watched, other = make_loader(config, tokenizer), make_loader(config, tokenizer)
    seen = []
    for _ in range(8):
        watched.get_state()
        seen.append(next(watched))
    assert_same(seen, take(other, 8))


def first_tokens(config, tokenizer, epochs):
    """The sequences' tokens as bytes, in order, epoch by epoch."""
    config = replace(config, packing=False, batch_size=1, epochs=epochs)
    rows = [b["tokens"].tobytes() for b in make_loader(config, tokenizer)]
    return [rows[i * len(PAIRS) : (i + 1) * len(PAIRS)] for i in range(epochs)]


def test_each_epoch_has_every_example_once_in_an_order_of_its_own(config, tokenizer):
    one, two = first_tokens(config, tokenizer, epochs=2)
    assert sorted(one) == sorted(two)
    assert len(set(one)) == len(PAIRS)
    assert one != two


@pytest.mark.parametrize("packing", [True, False])
def test_every_other_batch_is_of_the_held_out_records_alone(config, tokenizer, packing):
    batches = take(make_loader(replace(config, holdout=0.2, packing=packing, batch_size=2), tokenizer), 120)
    whole = make_loader(replace(config, shuffle=False, packing=False, epochs=1, batch_size=1), tokenizer)
    number = {b["tokens"][0][b["segments"][0] == 1].tobytes(): i for i, b in enumerate(whole)}
    found = [set(), set()]
    for i, batch in enumerate(batches):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            found[i % 2] |= {number[tokens[segments == s].tobytes()] for s in range(1, segments.max() + 1)}
    assert found[1] == set(range(0, N, 5))
    assert found[0] == set(range(N)) - found[1]


def test_after_the_held_out_batches_every_batch_is_of_all_records(config, tokenizer):
    config = replace(config, packing=False, batch_size=2)
    batches = take(make_loader(replace(config, holdout=0.2, holdout_batches=3), tokenizer), 9)
    assert_same(batches[:3], take(make_loader(replace(config, holdout=0.2), tokenizer), 3))
    assert_same(batches[3:], take(make_loader(config, tokenizer), 9)[3:])


def test_the_seed_decides_the_order(config, tokenizer):
    (one,), (same,) = first_tokens(config, tokenizer, 1), first_tokens(config, tokenizer, 1)
    (other,) = first_tokens(replace(config, seed=4), tokenizer, 1)
    assert one == same != other
    assert sorted(one) == sorted(other)


def test_without_shuffling_the_order_is_that_of_the_file(config, tokenizer):
    (rows,) = first_tokens(replace(config, shuffle=False), tokenizer, 1)
    for row, record in zip(rows, PAIRS, strict=True):
        start = tokenizer.encode(record["prompt"])[:4]
        assert np.frombuffer(row, np.int32)[: len(start)].tolist() == start


@pytest.mark.parametrize("packing", [True, False])
def test_one_epoch_for_evaluation_counts_every_target_once(config, tokenizer, packing):
    loader = make_loader(replace(config, epochs=1, shuffle=False, packing=packing), tokenizer)
    counted = sum(float((b["weights"] == 1).sum()) for b in loader)
    expected = sum(len(tokenizer.encode(r["completion"])) + 1 for r in PAIRS)
    assert counted == expected


def test_a_classification_epoch_has_each_label_as_often_as_the_records(config, tokenizer):
    config = replace(config, template="{prompt}", epochs=1, batch_size=8)
    loader = make_loader(config, tokenizer, row_format=LABELED)
    batches = list(loader)
    labels = np.concatenate([b["labels"][b["valid"] == 1] for b in batches])
    assert loader.labels == ("0", "1", "2")
    assert np.bincount(labels).tolist() == [N // 3] * 3
    assert [b["valid"].sum() for b in batches] == [8] * 11 + [2]
    assert set(batches[0]) == {"tokens", "segments", "labels", "valid"}


def test_labels_can_be_given_so_that_two_files_agree(config, tokenizer):
    config = replace(config, template="{prompt}", labels=("2", "1", "0"), shuffle=False)
    loader = make_loader(config, tokenizer, row_format=LABELED)
    assert loader.labels == ("2", "1", "0")
    assert next(loader)["labels"].tolist() == [2, 1, 0, 2]


def test_the_statistics_count_examples_sequences_tokens_and_cuts(config, tokenizer):
    whole = make_loader(replace(config, seq_len=1000), tokenizer).stats
    cut = make_loader(config, tokenizer).stats
    sizes = [len(tokenizer.encode(r["prompt"])) + len(tokenizer.encode(r["completion"])) for r in PAIRS]
    learned = sum(len(tokenizer.encode(r["completion"])) + 1 for r in PAIRS)
    counts = {"examples": N, "measured": N, "sequences": N, "tokens": sum(sizes), "truncated": 0, "dropped": 0}
    assert whole == {**counts, "learned": learned, "answers": N, "ends": N}
    assert cut["truncated"] == sum(size > 48 for size in sizes) > 0
    assert cut["tokens"] < whole["tokens"]


def test_a_dataset_too_large_to_keep_gives_the_same_batches(config, tokenizer, monkeypatch):
    expected = take(make_loader(config, tokenizer), 10)
    monkeypatch.setattr(examples, "KEPT", 10)
    monkeypatch.setattr(examples, "MEASURED", 5)
    loader = make_loader(config, tokenizer)
    assert (loader.stats["examples"], loader.stats["measured"]) == (N, 5)
    assert_same(take(loader, 10), expected)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, r"bad\.jsonl:91: the record has no field 'completion'"),
        ({"prompt": "x", "completion": " "}, r"bad\.jsonl:91: empty completion"),
    ],
)
def test_a_bad_record_is_named_before_training_in_a_file_of_any_size(
    config, tokenizer, write, monkeypatch, record, message
):
    monkeypatch.setattr(examples, "KEPT", 1)
    monkeypatch.setattr(examples, "MEASURED", 1)
    with pytest.raises(UserError, match=message):
        make_loader(replace(config, source=write([*PAIRS, record], "bad.jsonl")), tokenizer)


def test_an_empty_completion_is_named_before_training_among_records_that_have_every_field(
    config, tokenizer, write, monkeypatch
):
    monkeypatch.setattr(FileSource, "typed", True)
    monkeypatch.setattr(examples, "KEPT", 1)
    monkeypatch.setattr(examples, "MEASURED", 1)
    with pytest.raises(UserError, match=r"bad\.jsonl:91: empty completion"):
        make_loader(replace(config, source=write([*PAIRS, {"prompt": "x", "completion": ""}], "bad.jsonl")), tokenizer)


def test_only_the_first_examples_are_read_when_so_many_are_asked_for(config, tokenizer):
    loader = make_loader(replace(config, max_examples=7), tokenizer)
    assert loader.stats["examples"] == 7
    assert len(read_examples(replace(config, max_examples=7), tokenizer)) == 7


def test_examples_for_generation_keep_room_and_the_whole_answer(config, tokenizer):
    found = read_examples(config, tokenizer, reserve=20)
    assert [e["completion"] for e in found] == [r["completion"].strip() for r in PAIRS]
    assert all(e["prompt_ids"] == tokenizer.encode(e["prompt"]) for e in found)
    assert max(len(e["prompt_ids"]) for e in found) <= 28
    short = [(e, r) for e, r in zip(found, PAIRS, strict=True) if len(tokenizer.encode(r["prompt"])) <= 28]
    assert short
    assert all(e["prompt"] == r["prompt"] for e, r in short)


def test_examples_for_classification_have_the_text_and_the_index_of_the_label(config, tokenizer):
    found = read_examples(replace(config, template="{prompt}"), tokenizer, row_format=LABELED)
    assert found[4] == {"text": PAIRS[4]["prompt"], "label": 1}


def test_conversations_are_learned_through_the_chat_template(config, tokenizer, write):
    talk = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]
    batch = next(make_loader(replace(config, source=write(talk, "talk.jsonl"), batch_size=1, epochs=1), tokenizer))
    learned = batch["targets"][batch["weights"] == 1].tolist()
    assert learned == tokenizer.encode("So.<|im_end|>\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, r"data\.seq_len=1 is below 2"),
        ({"batch_size": 0}, r"data\.batch_size=0 is below 1"),
        ({"prompt_loss_weight": 1.5}, r"data\.prompt_loss_weight=1\.5 is not in \[0, 1\]"),
        ({"seed": -1}, r"data\.seed=-1 is not in"),
        ({"epochs": -1}, r"data\.epochs=-1 is below 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "jsonl:/nowhere/x.jsonl"}, "/nowhere/x.jsonl does not exist"),
        ({"template": "chta"}, r"unknown template 'chta' \(did you mean 'chat'\?\)"),
        ({"template": "{promt}"}, r"template field 'promt' is not in jsonl:.* \(did you mean 'prompt'\?\)"),
        ({"truncate": "completoin"}, r"unknown template field 'completoin' \(did you mean 'completion'\?\)"),
        ({"seq_len": 65}, r"data\.seq_len=65 exceeds the model's 64 positions"),
        ({"seq_len": 3}, r"records\.jsonl:\d+: \d+ tokens without the text that may be cut; at most 4 fit"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(config, tokenizer, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        make_loader(replace(config, **changes), tokenizer, max_positions=64)
    assert "\n" not in str(caught.value)


def test_a_field_without_labels_is_refused_before_training(config, tokenizer):
    with pytest.raises(UserError, match="'lable' holds no labels"):
        make_loader(replace(config, template="{prompt}", label_field="lable"), tokenizer, row_format=LABELED)


def test_a_chat_needs_a_tokenizer_with_a_chat_template(config, plain_tokenizer):
    with pytest.raises(UserError, match=r"records\.jsonl:1: the tokenizer has no chat template"):
        make_loader(replace(config, template="chat"), plain_tokenizer)


@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"seed": 4}, {"split": "train[:20]"}, {"template": "chat"}])
def test_a_state_of_other_data_or_settings_is_refused(config, tokenizer, changes):
    state = make_loader(config, tokenizer).get_state()
    other = make_loader(replace(config, **changes), tokenizer)
    with pytest.raises(UserError, match=f"the saved data state is of other data: data.{next(iter(changes))} was"):
        other.set_state(state)


def test_a_state_is_refused_when_the_file_has_changed(config, tokenizer, write):
    state = make_loader(config, tokenizer).get_state()
    write([{**PAIRS[0], "completion": " other"}, *PAIRS[1:]])
    with pytest.raises(UserError, match=r"data\.records was"):
        make_loader(config, tokenizer).set_state(state)


def test_a_closed_loader_has_no_more_batches(config, tokenizer):
    loader = make_loader(config, tokenizer)
    next(loader)
    loader.close()
    assert list(loader) == []


def test_a_process_that_ends_with_an_open_loader_ends_in_silence(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b c"}\n' * 9)
    code = """
import sys
from lowrank.data import DataConfig, make_loader
class Letters:
    bos_id, eos_id, pad_id, stop_ids = 0, 1, 2, ()
    def encode_special(self, text): return [ord(c) for c in text]
    def encode_offsets(self, text): return self.encode_special(text), [(i, i + 1) for i in range(len(text))]
loader = make_loader(DataConfig(source="jsonl:" + sys.argv[1], seq_len=8), Letters())
print(next(loader)["tokens"].shape)
"""
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=400)
    assert (run.returncode, run.stdout, run.stderr) == (0, "(8, 8)\n", "")
