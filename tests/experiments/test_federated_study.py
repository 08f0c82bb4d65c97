"""The federated study on a tiny model: clients share all records, every row runs once, and its averages are exact."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments.federated import clients, command, rounds, table
from experiments.federated.rounds import ROWS
from experiments.protocol.table import read_rows
from lowrank import methods, pretrained
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import merge
from tests.support import tiny_checkpoint
from tests.support.close import assert_close


@pytest.fixture
def size(tmp_path):
    """A size of two clients on a tiny model, whose records are those of `tiny_checkpoint`."""
    (tmp_path / "records").mkdir()
    for split in ("train", "test"):
        tiny_checkpoint.records(tmp_path / f"records/{split}.jsonl", 12)
    files = {"model": str(tiny_checkpoint.bert(tmp_path / "model")), "source": f"jsonl:{tmp_path / 'records'}"}
    return dataclasses.replace(command.SIZES["ci"], clients=2, labels=("cat", "dog"), **files)


def test_clients_share_all_records_and_differ_in_their_labels():
    labels = [i % 3 for i in range(300)]
    parts = clients.partition(labels, 4, np.random.default_rng(0))
    assert sorted(itertools.chain(*parts)) == list(range(300))
    shares = [[np.mean([labels[i] == label for i in part]) for label in range(3)] for part in parts]
    assert np.ptp(shares, axis=0).max() > 0.3
    assert all(clients.partition([0, 0], 2, np.random.default_rng(i)) for i in range(5))


@pytest.mark.all
def test_every_row_runs_once_and_the_tables_have_the_seeds(size, tmp_path, monkeypatch):
    few = dataclasses.replace(size, rounds=1, seeds=1)
    monkeypatch.setattr(rounds, "_step", lambda network, trained, moments, *rest: (trained, moments))
    command.run(few, tmp_path / "runs")
    monkeypatch.setattr(command, "run_row", lambda *rest: pytest.fail("run again"))
    command.run(few, tmp_path / "runs")
    table.write_tables(tmp_path / "runs", tmp_path / "results", 1)
    rows = read_rows(tmp_path / "results/table.csv")
    assert [row["row"] for row in rows] == [row.name for row in ROWS]
    assert {row["seeds"] for row in rows} == {"1"}
    assert len(read_rows(tmp_path / "results/rounds.csv")) == len(ROWS)
    assert "gap of the last round" in table.markdown(tmp_path / "results")
    with pytest.raises(UserError, match="run the study with --workers=1"):
        table.write_tables(tmp_path / "runs", tmp_path / "results", 2)
    scores = json.loads(table.path(tmp_path / "runs", ROWS[2], 0).read_text())
    assert [len(values) for values in scores.values()] == [1, 1]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.pooled], ids=lambda row: row.name)
def test_the_next_model_is_the_mean_of_the_clients_models_but_for_fedit(row, size):
    base = pretrained.load(size.model, model={"num_labels": 2})
    state = rounds.start(base, row, 0)
    mask = methods.trainable_mask(methods.build_method(row.method), state.params, ("head/.*",))
    rng = np.random.default_rng(0)
    fixed = "kernel/a" if row.aggregate == "ffa_lora" else "nothing"

    def moved():
        def shift(name, x, learns):
            shifts = learns and not name.endswith(fixed)
            return x + np.float32(0.1) * rng.standard_normal(x.shape).astype(np.float32) if shifts else x

        return tree.map_named(shift, state.params, mask)

    found, weights = [moved(), moved()], [0.75, 0.25]
    after = rounds.average(state, found, weights, row, 1)
    mean = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, *(merge(of) for of in found))
    differences = [
        float(np.linalg.norm(x - y)) / float(np.linalg.norm(y))
        for x, y in zip(jax.tree.leaves(merge(after.params)), jax.tree.leaves(mean), strict=True)
        if np.any(y)
    ]
    assert (max(differences) < 1e-5) == (row.name != "FedIT")
    assert (after.gap > 1e-3) == (row.name in ("FedIT", "FedEx-LoRA", "FLoRA"))
    assert_close(after.params["head"]["kernel"], mean["head"]["kernel"], relative=1e-6)
