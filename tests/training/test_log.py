"""The log can be read while it is written, survives a restart at any step, and never breaks the run's output."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from lowrank.core.errors import UserError
from lowrank.training import log as runlog
from lowrank.training.log import RunLog, read_metrics
from tests.support.close import assert_close

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def quiet(workdir, total=10, **kwargs):
    return RunLog(workdir, total, stream=io.StringIO(), **kwargs)


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def events(workdir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(workdir / "tensorboard"))
    reader.Reload()
    return [(e.step, e.value) for e in reader.Scalars(tag)]


def strict_json(line):
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_each_call_is_one_line_of_json_on_disk_at_once(tmp_path):
    with quiet(tmp_path) as log:
        log.scalars(1, {"train/loss": jnp.float32(2.5), "train/lr": 1e-3})
        first = strict_json(lines(tmp_path)[0])
        log.scalars(2, {"eval/loss": 2})
    assert first["step"] == 1
    assert first["train/loss"] == 2.5
    assert first["train/lr"] == 1e-3
    assert first["seconds"] >= 0
    assert [strict_json(line)["step"] for line in lines(tmp_path)] == [1, 2]


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path, caplog):
    with quiet(tmp_path) as log:
        log.scalars(1, {"a": math.nan, "b": jnp.inf, "c": -jnp.inf})
    assert strict_json(lines(tmp_path)[0])["a"] == "NaN"
    (found,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(found["a"])
    assert (found["b"], found["c"]) == (math.inf, -math.inf)
    assert not caplog.records


def test_a_restart_drops_what_came_after_its_step(tmp_path):
    with quiet(tmp_path) as log:
        for step in (2, 4, 6):
            log.scalars(step, {"train/loss": step / 3})
    before = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train/lo')  # the run was killed here
    with quiet(tmp_path, start=4) as log:
        assert lines(tmp_path) == before[:2]
        assert log.seconds >= json.loads(before[1])["seconds"]
        log.scalars(6, {"train/loss": 0.5})
    assert [(m["step"], m["train/loss"]) for m in read_metrics(tmp_path / "metrics.jsonl")] == [
        (2, 2 / 3),
        (4, 4 / 3),
        (6, 0.5),
    ]
    assert_close(events(tmp_path, "train/loss"), [(2, 2 / 3), (4, 4 / 3), (6, 0.5)])


def test_a_run_that_starts_over_starts_an_empty_log(tmp_path):
    with quiet(tmp_path) as log:
        log.scalars(0, {"eval/loss": 1.0})
        log.scalars(5, {"eval/loss": 0.5})
    with quiet(tmp_path) as log:
        log.scalars(0, {"eval/loss": 2.0})
    assert [m["eval/loss"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    assert events(tmp_path, "eval/loss") == [(0, 2.0)]


def test_a_spoilt_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 0.1}\nspoilt\n{"step": 2, "seconds": 0.2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a JSON object of metrics: 'spoilt'"):
        quiet(tmp_path, start=2)


def test_what_is_flushed_is_on_disk_while_the_log_is_open(tmp_path):
    with RunLog(tmp_path, 2, stream=io.StringIO()) as log:
        log.scalars(1, {runlog.LOSS: 1.0})
        log.flush()
        assert sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) > 50


def test_text_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path) as log:
        log.text("config", "rank **8**")
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (event,) = reader.Tensors("config/text_summary")
    assert event.tensor_proto.string_val == [b"rank **8**"]


def test_speed_counts_tokens_since_the_last_loss_and_leaves_pauses_out(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with quiet(tmp_path, 40, tokens_per_step=8) as log:
        now[0] += 60  # compilation
        log.scalars(10, {"train/loss": 1.0})
        assert log.tokens_per_s is None
        now[0] += 4
        log.scalars(20, {"train/loss": 1.0})
        with log.paused():
            now[0] += 1000
            log.scalars(20, {"eval/loss": 1.0})
        now[0] += 1
        log.scalars(30, {"train/loss": 1.0})
        assert log.tokens_per_s == 8 * 20 / 5
    rates = [m.get("train/tokens_per_s") for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [None, 20.0, None, 80.0]


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunLog(tmp_path, 100, tokens_per_step=1500, every_seconds=30, stream=stream) as log:
        for step in range(0, 101, 10):
            log.scalars(step, {"train/loss": step / 10})
            now[0] += 10
        log.say("done")
    assert stream.getvalue().splitlines() == [
        "step 0/100  loss 0.0000",
        "step 30/100  loss 3.0000  1.50k tokens/s  ETA 01:10",
        "step 60/100  loss 6.0000  1.50k tokens/s  ETA 00:40",
        "step 90/100  loss 9.0000  1.50k tokens/s  ETA 00:10",
        "step 100/100  loss 10.0000  1.50k tokens/s  ETA 00:00",
        "done",
    ]


def test_on_a_terminal_progress_is_a_bar(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, 8, start=2, stream=stream) as log:
        log.say("table")
        log.scalars(4, {"train/loss": 0.25})
    assert "table" in stream.getvalue()
    assert "2/8" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("]")
    assert "4/8" in stream.getvalue()
    assert "loss 0.2500" in stream.getvalue()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog.jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with RunLog(tmp_path, 8, stream=stream) as log, log.paused():
        log.scalars(1, {"train/loss": 1.0})
        log.text("a", "b")
        log.say("hello")
    assert not list(tmp_path.iterdir())
    assert not stream.getvalue()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file"):
        quiet(tmp_path / "file")
    log = quiet(tmp_path)
    log._lines.close()
    with Path("/dev/full").open("a") as full:
        log._lines = full
        with pytest.raises(UserError, match=r"cannot write the log at .*metrics\.jsonl: No space left on device"):
            log.scalars(1, {"train/loss": 1.0})
        with pytest.raises(UserError, match="No space left on device"):
            log.close()


def test_the_log_does_not_import_torch(tmp_path):
    program = (
        "import sys; from lowrank.training.log import RunLog\n"
        "RunLog(sys.argv[1], 1).close(); print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
