"""The log of a run, and that of one which is stopped and continued by the same command. For tests."""

from lowrank.training import loop
from lowrank.training.log import read_metrics


def numbers(folder):
    """The lines of a run's log without times and speeds."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_s" not in k} for line in lines]


def whole_and_resumed(config, folder, monkeypatch, *, stop):
    """`(the numbers of a run, those of the run that stops after `stop` steps and is continued)`."""
    loop.run(config, folder / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step >= stop)
        assert loop.run(config, folder / "stopped") == {"stopped_at": stop}
    loop.run(config, folder / "stopped")
    return numbers(folder / "whole"), numbers(folder / "stopped")
