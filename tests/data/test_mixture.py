"""Several sources: one after another, and mixed by tokens with a position that continues exactly."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.data import LABELED, DataConfig, examples, make_loader, read_examples
from lowrank.data.mixture import open_parts
from tests.data.conftest import Bytes

SHORT = [{"prompt": f"{i} =>", "completion": " a", "label": "x"} for i in range(60)]
LONG = [
    {"messages": [{"role": "user", "content": "b" * 20}, {"role": "assistant", "content": f"{i} is b"}]}
    for i in range(9)
]


@pytest.fixture
def config(write):
    source = f"0.25 * {write(SHORT, 'short.jsonl')} + .75*{write(LONG, 'long.jsonl')}"
    return DataConfig(source=source, seq_len=64, batch_size=4, seed=3)


def take(loader, count):
    return list(itertools.islice(loader, count))


def tokens_of_each(batches):
    """The tokens of the short records and those of the long ones."""
    counts = np.zeros(2, int)
    for batch in batches:
        for tokens, segments, valid in zip(batch["tokens"], batch["segments"], batch["valid"], strict=True):
            for s in range(1, segments.max() + 1) if valid else ():
                sequence = tokens[segments == s]
                counts[int(sequence[0] == 3)] += len(sequence)  # <|im_start|>
    return counts


@pytest.mark.parametrize("packing", [True, False])
def test_each_source_has_its_share_of_the_tokens(config, tokenizer, packing):
    counts = tokens_of_each(take(make_loader(dataclasses.replace(config, packing=packing), tokenizer), 60))
    assert abs(counts[0] / counts.sum() - 0.25) < 0.01


def test_an_epoch_has_each_record_of_each_source_once(config, tokenizer):
    bare = config.source.replace("0.25 * ", "").replace(".75*", "")
    whole = {}
    for source in (config.source, bare):
        once = dataclasses.replace(config, source=source, epochs=1, packing=False, batch_size=1)
        whole[source] = sorted(batch["tokens"].tobytes() for batch in make_loader(once, tokenizer))
    assert whole[config.source] == whole[bare]
    assert len(set(whole[bare])) == len(SHORT) + len(LONG)


KINDS = {
    "packed": {},
    "padded": {"packing": False},
    "two epochs": {"epochs": 2, "packing": False},
    "held out": {"holdout": 0.2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [1, 7])
def test_a_saved_position_continues_exactly(config, tokenizer, kind, before):
    config = dataclasses.replace(config, **KINDS[kind])
    loader = make_loader(config, tokenizer)
    take(loader, before)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 40)
    other = make_loader(config, tokenizer)
    other.set_state(state)
    found = take(other, 40)
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert {name: x.tobytes() for name, x in left.items()} == {name: x.tobytes() for name, x in right.items()}


CHILD = """
import json, os, signal, sys
from lowrank.data import DataConfig, make_loader
from tests.data.conftest import Bytes
loader = make_loader(DataConfig(**json.loads(sys.argv[1])), Bytes())
for _ in range(5):
    print(json.dumps([loader.get_state(), next(loader)["tokens"].tolist()]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_rows_after_a_kill_are_those_of_a_run_without_one(config):
    words = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(config))]
    killed = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    states, rows = zip(*map(json.loads, killed.stdout.splitlines()), strict=True)
    whole = [batch["tokens"].tolist() for batch in take(make_loader(config, Bytes()), 9)]
    assert list(rows) == whole[:5]
    resumed = make_loader(config, Bytes())
    resumed.set_state(states[3])
    assert [batch["tokens"].tolist() for batch in take(resumed, 6)] == whole[3:]


def test_a_state_of_other_weights_is_refused(config, tokenizer):
    state = make_loader(config, tokenizer).get_state()
    other = dataclasses.replace(config, source=config.source.replace("0.25", "0.5"))
    with pytest.raises(UserError, match=r"data\.weights was \[0\.25, 0\.75\], is \[0\.5, 0\.75\]"):
        make_loader(other, tokenizer).set_state(state)


def test_the_log_shows_each_source(config, tokenizer, monkeypatch):
    lines = make_loader(config, tokenizer).describe().splitlines()
    assert lines[0].startswith("data: 69 examples; 69 sequences, ")
    assert [line.partition(" of about")[0].partition("(train)")[2] for line in lines[1:3]] == [
        ": 25.0% of the tokens, 60 examples",
        ": 75.0% of the tokens, 9 examples",
    ]
    assert "⟦ a⟧" in "".join(lines[3:]).replace("</s>", "")
    monkeypatch.setattr(examples, "KEPT", 10)
    monkeypatch.setattr(examples, "MEASURED", 20)
    assert make_loader(config, tokenizer).describe().splitlines()[1:] == lines[1:]


def test_the_labels_are_those_of_all_sources(write, tokenizer):
    sources = write(SHORT, "a.jsonl"), write([{"prompt": "p", "label": "y"}], "b.jsonl")
    config = DataConfig(source=" + ".join(sources), template="{prompt}", shuffle=False, epochs=1, seq_len=32)
    loader = make_loader(config, tokenizer, row_format=LABELED)
    assert loader.labels == ("x", "y")
    assert [batch["labels"][batch["valid"] == 1].tolist() for batch in loader][-1][-1] == 1


def test_a_bad_record_of_the_second_source_is_named_and_records_are_limited_for_each(config, tokenizer, write):
    assert len(read_examples(dataclasses.replace(config, max_examples=4), tokenizer)) == 8
    bad = write([*LONG, {"messages": []}], "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl:10: messages must be a list of turns"):
        make_loader(dataclasses.replace(config, source=f"{write(SHORT)} + {bad}"), tokenizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0.5 * jsonl:{a} + jsonl:{a}", r"data\.source: 'jsonl:.*' has no weight, and others have: write WEIGHT \*"),
        ("0 * jsonl:{a} + 1 * jsonl:{a}", r"data\.source: 'jsonl:.*' has the weight 0"),
        ("jsonl:{a} + jsnl:{a}", "unknown dataset 'jsnl:.*'"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(write, tmp_path, spec, message):
    path = write(SHORT).removeprefix("jsonl:")
    with pytest.raises(UserError, match=message):
        open_parts(spec.replace("{a}", path), "train", tmp_path)
