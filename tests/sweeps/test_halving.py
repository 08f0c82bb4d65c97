"""Asynchronous successive halving: who goes on from a rung, and a study in which poor cells stop."""

import numpy as np

from lowrank.sweeps import halving
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.study import Halving
from lowrank.sweeps.worker import Worker
from tests.support import dummy_cells


def test_the_rungs_grow_by_the_reduction():
    assert halving.rungs(Halving(1, 4), 70) == [1, 4, 16, 64]
    assert halving.rungs(Halving(2, 3), 18) == [2, 6, 18]
    assert halving.rungs(Halving(3, 2), 2) == []


def test_a_cell_goes_on_above_the_quantile_that_ray_tune_takes():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        setting, scores = Halving(1, int(rng.integers(2, 5))), list(rng.normal(size=int(rng.integers(1, 12))))
        cutoff = np.quantile(scores, 1 - 1 / setting.reduction)
        expected = [score >= cutoff - 1e-9 for score in scores]  # the quantile may round to above a score
        assert [halving.goes_on(score, scores, setting, "max") for score in scores] == expected
        low = [-score for score in scores]
        assert [halving.goes_on(score, low, setting, "min") for score in low] == expected
    assert not halving.goes_on(float("nan"), [1.0, float("nan")], Halving(), "min")


def test_poor_cells_stop_at_a_rung_and_are_not_tried_again(tmp_path):
    setting = {"halving": Halving(1, 2), "metric": "perplexity", "limits": {"lease": 0.2}}
    study = dummy_cells.make_folder(tmp_path, count=3, **setting)
    script = """
        signal.signal(15, lambda *unused: exit(42))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 1.0, "eval/perplexity": seed + 1.0}))
        time.sleep(0.6 if seed == 0 else 600)
        finish()
    """
    assert Worker(study, dummy_cells.command(script), lambda line: None, poll=0.02).run() == 0
    found = Ledger(tmp_path, study.limits).histories([cell.key for cell in study.cells])
    assert [[event["state"] for event in found[cell.key].events] for cell in study.cells] == [
        ["claimed", "done"],
        ["claimed", "pruned"],
        ["claimed", "pruned"],
    ]
    last = found[study.cells[1].key].last
    assert (last["rung"], last["score"]) == (1, 2.0)
