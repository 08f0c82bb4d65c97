"""The study of merges on a tiny model: every cell runs once, the tables have the seeds, and a stop is continued."""

import dataclasses
import json

import pytest

from experiments.merging import command, sizes, table, tasks, world
from experiments.merging.sizes import MERGES, SIZES
from experiments.protocol.table import read_rows
from lowrank.core.errors import UserError
from lowrank.merging.rules import RULES
from tests.support import tiny_checkpoint
from tests.support.close import assert_close

OF_TWO_OR_ONE = {"slerp", "nuslerp", "nearswap", "passthrough"}
NOT_MERGES_OF_TASKS = OF_TWO_OR_ONE | {"uniform_soup", "greedy_soup"}  # which are of runs of one task


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """`(size, folder)` of a study of a tiny model, whose texts are written under `tmp_path`."""
    records = tmp_path / "records"
    records.mkdir()
    for split in ("train", "validation", "test"):
        tiny_checkpoint.records(records / f"{split}.jsonl", 12)
    source = {"source": f"jsonl:{records}"}
    own = {"template": "{prompt}", "completion": "{completion}"}
    monkeypatch.setattr(tasks, "TASKS", {"record": source | own, "text": source | {"template": "text"}})
    texts = {**tasks.TASKS, tasks.ELSEWHERE: source | {"template": "text", "split": "test"}}
    monkeypatch.setattr(tasks, "TEXTS", texts)
    model = tiny_checkpoint.llama(tmp_path / "model")
    few = tuple(merge for merge in MERGES if merge.name in ("linear", "ties-0.5"))
    return dataclasses.replace(SIZES["ci"], model=str(model), merges=few), tmp_path / "cells"


@pytest.mark.all
def test_every_cell_runs_once_and_the_tables_have_the_seeds(small_world, tmp_path, monkeypatch):
    size, folder = small_world
    command.run(size, folder)
    table.write_tables(size, folder, tmp_path / "results")
    rows = {row["model"]: row for row in read_rows(tmp_path / "results/table.csv")}
    assert list(rows) == ["base", "own expert", "joint", "ensemble", "linear", "ties"]
    assert {row["seeds"] for row in rows.values()} == {"2"}
    assert rows["ties"]["density"] == "0.5"
    assert float(rows["own expert"]["share_mean"]) == 1.0
    assert [r["model"] for r in read_rows(tmp_path / "results/negation.csv")] == ["base", "joint", "joint - 1 record"]
    assert "share of the gains" in table.markdown(tmp_path / "results")
    one = json.loads((folder / "linear-0.json").read_text())
    monkeypatch.setattr(world.World, "scores", lambda *rest: pytest.fail("scored again"))
    command.run(size, folder)
    (folder / "linear-0.json").unlink()
    with pytest.raises(UserError, match=r"linear-0\.json is missing"):
        table.write_tables(size, folder, tmp_path / "results")
    monkeypatch.undo()
    assert one.keys() == {"record", "text", "elsewhere"}


def test_a_model_of_the_base_and_all_of_an_update_scores_as_the_expert(small_world):
    size, folder = small_world
    found = world.load(size)
    cells = dict(command.cells(size, folder))
    expert = cells["record-0"](found)
    update = world.updates(found, command.expert_folder(folder, "record", 0))
    merged = world.merge(found, sizes.Merge("task_arithmetic", {"weight": 0.5}), [update, update], [], 0)
    assert_close(found.nll([found.with_kernels(merged)], "record", "test"), expert["record"], relative=1e-5)
    mean = found.nll([found.base.params, found.base.params], "record", "test")
    assert_close(mean, found.nll([found.base.params], "record", "test"), relative=1e-6)


def test_every_rule_that_merges_tasks_is_a_row():
    assert {merge.rule for merge in MERGES} == RULES.keys() - NOT_MERGES_OF_TASKS
