"""Continued pre-training: several sources scored apart, replay by share of tokens, and infilling learned and scored."""

import json

import numpy as np
import pytest

from configs import continued
from launch.evaluate import evaluate
from lowrank import pretrained
from lowrank.adapters import load
from lowrank.core.errors import UserError
from lowrank.training import build, loop
from lowrank.training.log import read_metrics
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

NEW = [f"the big cat ran under the {c} moon . the dog ran ." for c in ("red", "blue")] * 6
OLD = [f"a small dog sat on the {c} sun ." for c in ("red", "blue")] * 3
MARKS = ("saw", "ate", "where")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, of in (("new", NEW), ("old", OLD)):
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in of))
    return folder


def config(files, texts, **changes):
    new, old = (f"jsonl:{texts / name}" for name in ("new", "old"))
    group = {"source": f"0.75 * {new} + 0.25 * {old}", "split": "train", "template": "text", "seq_len": 32}
    group |= {"infill": {"sentinels": MARKS, "cuts": "tokens", "rate": 0.5}}
    scored = {"split": "test", "sources": {"new": new, "old": {"source": old, "max_examples": 4}}, "every": 2}
    scored |= {"infill": {"documents": 5, "max_new": 4, "longest": 12}}
    made = config_of(files, "", steps=4, mesh__data=1, **changes)
    with made.ignore_type():
        made.method = {"name": "lora", "rank": 2, "also_tokens": MARKS}
        made.data, made.eval = {**group, "batch_size": 4}, scored
    return made


@pytest.fixture(scope="module")
def done(files, texts, tmp_path_factory):
    """`(config, folder, summary)` of a run."""
    made, folder = config(files, texts, optim__lr=0.05), tmp_path_factory.mktemp("run") / "run"
    return made, folder, loop.run(made, folder)


def test_sources_and_gaps_are_scored_during_a_run_and_after_it(files, done):
    _, folder, summary = done
    names = {f"{source}/{score}" for source in ("new", "old") for score in ("perplexity", "nll", "tokens")}
    gaps = ("exact_match", "edit_similarity", "perplexity", "left_to_right_perplexity", "documents")
    assert set(summary["before"]) == set(summary["after"]) == names | {f"infill/{name}" for name in gaps}
    assert summary["after"]["new/perplexity"] < summary["before"]["new/perplexity"]
    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl") if "eval/old/loss" in line}
    assert list(lines) == [0, 2, 4]
    assert lines[4]["eval/old/perplexity"] == summary["after"]["old/perplexity"]
    report = (folder / "report.md").read_text()
    assert report.index("| new/perplexity |") < report.index("| old/perplexity |") < report.index("## The run")
    trained = load.load_adapted(folder / "adapter", str(files / "llama"))
    before = pretrained.load(str(files / "llama")).params["embed"]["embedding"]
    rows = [trained.tokenizer.encode(name)[0] for name in MARKS]
    table = trained.params["embed"]["embedding"].materialize()
    assert sorted(rows) == np.flatnonzero(np.any(np.asarray(table != before), axis=-1)).tolist()


@pytest.mark.all
def test_a_finished_run_is_scored_again(done):
    made, folder, summary = done
    again = evaluate(made, folder)
    assert_close(again, summary["after"])


def test_replay_has_its_share_of_the_tokens_and_documents_end_with_eos(files, texts):
    made = config(files, texts)
    made.data.infill, made.eval.sources, made.eval.infill = None, None, None
    run = build.build_run(made)
    first, eos = {run.tokenizer.encode(text)[0]: name for name, text in (("new", NEW[0]), ("old", OLD[0]))}, 2
    assert run.tokenizer.eos_id == eos
    counts = dict.fromkeys(("new", "old"), 0)
    for _ in range(40):
        batch = next(run.loader)
        for tokens, targets, segments, weights in zip(
            *(batch[name] for name in ("tokens", "targets", "segments", "weights")), strict=True
        ):
            for s in range(1, segments.max() + 1):
                at = segments == s
                counts[first[int(tokens[at][0])]] += int(at.sum())
                assert targets[at][-1] == eos
                assert set(weights[at].tolist()) == {1.0}
    assert abs(counts["old"] / sum(counts.values()) - 0.25) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"split": "test", "sources": {"a/b": "x"}}}, r"eval\.sources\.a/b: the name is not one word"),
        ({"eval": {"split": "test", "sources": {"a": {"sauce": "x"}}}}, r"eval\.sources\.a\.sauce.*did you mean"),
        ({"eval": {"sources": {"a": "x"}}}, r"eval\.split is not set"),
        ({"eval": {"split": "test", "infill": {"docs": 1}}}, r"eval\.infill\.docs.*did you mean"),
        ({"checkpoint": {"best": "perplexity"}}, r"unknown score in checkpoint\.best 'perplexity'.*new/perplexity"),
    ],
)
def test_wrong_options_are_refused(files, texts, changes, message):
    made = config(files, texts)
    with made.ignore_type():
        made.update(changes) if "checkpoint" in changes else setattr(made, "eval", changes["eval"])
    with pytest.raises(UserError, match=message):
        build.build_run(made)


def test_gaps_are_of_documents(files):
    made = config_of(files, "rank=2", mesh__data=1)
    made.eval.update({"split": "train", "infill": {}})
    with pytest.raises(UserError, match=r"eval\.infill has gaps in documents filled in: set a data\.template"):
        build.build_run(made)


@pytest.mark.all
def test_the_best_step_can_be_that_of_one_source(files, texts, tmp_path):
    made = config(files, texts, optim__lr=0.05)
    made.checkpoint.best, made.eval.infill = "old/perplexity", None
    summary = loop.run(made, tmp_path / "run")
    assert summary["best_old/perplexity"] == summary["after"]["old/perplexity"]


def test_the_config_replays_a_quarter_and_warms_up_again():
    made = continued.get_config()
    assert made.data.source.startswith("0.75 * bbc_news + 0.25 * ")
    assert set(made.eval.sources) == {"new", "old"}
    assert 0 < made.optim.initial < 1
