"""`launch.evaluate --long`: the scores of a run whose context is longer than its base's, and their files."""

import json

import pytest

from launch import evaluate, long_context
from lowrank.core.errors import UserError
from lowrank.training import build, loop
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

LONG = {"lengths": (96, 128), "depths": (0.0, 1.0), "samples": 1, "tokens": 300, "stride": 64}


def config(files, **changes):
    """A run in twice the base's 64 positions."""
    made = config_of(
        files, "rank=2", steps=1, optim__warmup=0, data__batch_size=2, mesh__data=1, checkpoint__every=0, **changes
    )
    with made.unlocked(), made.ignore_type():
        made.eval = {"split": "train", "max_examples": 8, "before": False, "long": LONG}
        made.model.context = 128
    return made


def test_a_run_is_scored_and_its_tables_are_written(tmp_path, files):
    made = config(files)
    loop.run(made, tmp_path)
    scores = evaluate.evaluate(made, tmp_path, ["sliding", "positions", "price", "passkey", "kv"])
    assert {"perplexity", "sliding_perplexity", "passkey", "kv", "price_nats"} <= set(scores)
    assert scores["old_context"] == 64
    assert scores["price_nats"] != 0
    folder = tmp_path / long_context.FOLDER
    names = ["kv.md", "kv.png", "passkey.md", "passkey.png", "positions.csv", "retrieval.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len((folder / "retrieval.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    again = evaluate.evaluate(made, tmp_path, ["sliding"])
    assert_close(again["sliding_perplexity"], scores["sliding_perplexity"])
    json.dumps(scores)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["slidng"], {}, r"unknown long-context score 'slidng' \(did you mean 'sliding'"),
        (["kv"], {"lengths": (256,)}, r"eval.long.lengths has 256, and the model has 128 positions: set it to 2..128"),
        (["price"], {"context": 0}, "price compares with a base of a shorter context, and the model has the 64"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_adapter_is_read(files, tmp_path, names, changes, message):
    made = config(files)
    with made.ignore_type():
        made.model.context = changes.get("context", 128)
        made.eval.long = {"lengths": changes.get("lengths", (64,))}
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(made, tmp_path, names)


def test_an_objective_that_writes_no_texts_has_no_long_context_scores(files):
    made = config(files, data__source=f"jsonl:{files / 'pairs.jsonl'}", objective="reward")
    with pytest.raises(UserError, match="--long scores a model that writes texts"):
        long_context.check(build.build_run(made), ["kv"])
