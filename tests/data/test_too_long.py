"""Records that are longer than a row, and what the log says is learned."""

import dataclasses
import itertools
import re

import pytest

from lowrank.core.errors import UserError
from lowrank.data import DataConfig, examples, make_loader

N = 30
PAIRS = [{"prompt": "word " * (1 + i % 15), "completion": f" answer {i}"} for i in range(N)]


@pytest.fixture
def config(write):
    return DataConfig(source=write(PAIRS), seq_len=48, batch_size=4, seed=3)


def replace(config, **changes):
    return dataclasses.replace(config, **changes)


LONG = {"prompt": "x", "completion": "long " * 200}


def test_an_answer_too_long_that_is_met_while_training_is_left_out_and_said(config, tokenizer, write, monkeypatch):
    monkeypatch.setattr(examples, "KEPT", 1)
    monkeypatch.setattr(examples, "MEASURED", 1)
    loader = make_loader(replace(config, source=write([*PAIRS, LONG], "bad.jsonl")), tokenizer)
    list(itertools.islice(loader, 90))
    (note,) = loader.notes()
    assert re.match(r"left out: .*bad\.jsonl:31: \d+ tokens without the text that may be cut", note)
    assert loader.notes() == []


@pytest.mark.parametrize("kept", [1, 1000])
def test_a_record_that_is_too_long_is_an_error_before_training_if_asked(config, tokenizer, write, monkeypatch, kept):
    monkeypatch.setattr(examples, "KEPT", kept)
    short = [r for r in PAIRS if len(r["prompt"]) < 40]
    source = write([*short, {"prompt": "word " * 200, "completion": "b"}], "bad.jsonl")
    with pytest.raises(UserError, match=rf"bad\.jsonl:{len(short) + 1}: longer than data\.seq_len, and data"):
        make_loader(replace(config, source=source, too_long="error"), tokenizer)


def test_records_that_are_too_long_are_dropped_if_asked(config, tokenizer, write):
    dropping = replace(config, source=write([*PAIRS, LONG], "bad.jsonl"), too_long="drop")
    stats, cut = make_loader(dropping, tokenizer).stats, make_loader(config, tokenizer).stats
    assert (stats["dropped"], stats["truncated"]) == (cut["truncated"] + 1, 0)
    assert stats["sequences"] == N - cut["truncated"]


def test_a_dataset_of_which_nothing_fits_is_named(config, tokenizer, write):
    with pytest.raises(UserError, match="every record is longer than"):
        make_loader(replace(config, source=write([LONG], "bad.jsonl"), too_long="drop"), tokenizer)


def test_answers_without_an_end_are_refused(config, tokenizer, write):
    class Endless(type(tokenizer)):
        stop_ids = (1,)

        def __init__(self):
            super().__init__()
            self.stop_ids = (1,)

    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match="no token that ends a text is learned"):
        make_loader(DataConfig(source=write([turns]), seq_len=48), Endless())


def test_the_log_shows_what_is_learned(config, tokenizer, write):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    text = make_loader(DataConfig(source=write([{"messages": turns}] * 3), seq_len=48), tokenizer).describe()
    size = len(tokenizer.encode("two<|im_end|>\n"))
    assert "data: 3 examples; 3 sequences, " in text
    assert f"{3 * size} learned, 3 answers, 3 ends" in text
    assert text.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>\n⟧")


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(config, tokenizer, write):
    system = {"role": "system", "content": "Be brief."}
    pairs = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(9)]
    source = write([{"messages": [system, *itertools.chain(*pairs)]}])
    loader = make_loader(DataConfig(source=source, seq_len=90, packing=False), tokenizer)
    row = next(loader)
    text = tokenizer.decode(row["tokens"][0][row["segments"][0] > 0].tolist())
    assert loader.stats["truncated"] == 1
    assert 1 < loader.stats["answers"] < 9
    assert "Be brief." in text
    assert "q0" not in text
    assert text.rstrip().endswith("a8")
