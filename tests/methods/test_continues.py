"""Runs whose methods keep more than moments, masks or a changed base, resume bit for bit."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lowrank.training import loop
from lowrank.training.checkpoint import Checkpointer
from tests.support.tiny_runs import config_of

STEPS = 8
RUNS = {
    "relora, stopped at a restart": ("method=relora,every=3,warmup=2,rank=2", 3),
    "adalora": ("method=adalora,init_rank=4,target_rank=2,deltaT=2", 3),
}


def config(files, arg):
    return config_of(files, arg, optim__lr=0.05, mesh__data=1, checkpoint__every=0, steps=STEPS)


def last(workdir, config):
    """The arrays by name of a run's last checkpoint."""
    loop.run(config, workdir)
    with Checkpointer(workdir / "checkpoints") as saver:
        path = workdir / "checkpoints" / str(saver.latest()) / "arrays"
    with ocp.PyTreeCheckpointer() as reader:
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in reader.metadata(path).item_metadata}
        return reader.restore(path, restore_args=how)


@pytest.mark.parametrize(("arg", "stop"), RUNS.values(), ids=RUNS)
def test_a_run_that_was_stopped_continues_bit_for_bit(arg, stop, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step >= stop)
        assert loop.run(config(files, arg), tmp_path / "stopped") == {"stopped_at": stop}
    got, want = (last(tmp_path / name, config(files, arg)) for name in ("stopped", "whole"))
    bases = {name for name in want if name.startswith("frozen/")}
    assert bases == ({f"frozen/layers/attn/{m}/kernel/base" for m in "qv"} if "relora" in arg else set())
    assert sorted(got) == sorted(want)
    assert not [name for name in want if np.asarray(got[name]).tobytes() != np.asarray(want[name]).tobytes()]
