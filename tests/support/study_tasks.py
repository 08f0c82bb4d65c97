"""The tasks of the studies on tiny models and records. For tests."""

import dataclasses
from pathlib import Path

from experiments.study import run, stages, tasks
from tests.support import tiny_checkpoint as tiny


def shrink(folder: Path, monkeypatch) -> None:
    """Both tasks on tiny models; rows run in this process."""
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        tiny.records(folder / "data" / f"{split}.jsonl")
    templates = {"template": "{prompt}", "completion": "{completion}"}
    for task, model, more in (
        (tasks.TOPICS, {"name": str(folder / "bert"), "pooling": "mean"}, {}),
        (tasks.HEADLINES, {"name": str(folder / "llama")}, templates),
    ):
        data = {**task.settings["data"], "source": f"jsonl:{folder / 'data'}", "seq_len": 32, **more}
        settings = {**task.settings, "steps": 4, "data": data, "model": model, "log_every": 1}
        known = task.known if more else lambda model: 50.0  # the records have no titles to find texts by
        monkeypatch.setitem(tasks.TASKS, task.name, dataclasses.replace(task, settings=settings, known=known))
    here = lambda study, phase, task, name, *_: list(stages.PHASES[phase](study, tasks.TASKS[task], name))  # noqa: E731
    monkeypatch.setattr(run, "_row", here)
