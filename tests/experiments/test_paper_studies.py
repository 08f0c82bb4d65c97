"""The studies of papers: every size makes runs, the best rates are searched and used, and the table says what ran."""

import csv
import dataclasses
import importlib
import json
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from experiments import tables
from experiments.protocol import command, experiment, table
from experiments.protocol.experiment import RATE
from launch import sweep, sweep_plan
from lowrank.core import parameter_summary
from lowrank.core.errors import UserError
from lowrank.core.paths import as_path
from lowrank.memory import devices
from lowrank.sweeps.check import checked_runs
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.worker import Worker
from lowrank.training import loop
from tests.support import dummy_cells
from tests.support.close import assert_close

FAKE = """
    cells = json.loads((folder.parents[1] / "study.json").read_text())["cells"]
    config = next(cell["config"] for cell in cells if cell["key"] == key)
    worse = abs(config["optim"]["lr"] - 1e-2) + (config["method"]["name"] == "full")
    finish(trained_params=7, seconds=1.0, after={"accuracy": 0.9 - 0.1 * worse + 1e-3 * (seed % 3) * (1 + worse)})
"""


class Scored(NamedTuple):
    """What a table reads of a result."""

    seed: int
    score: float


def load(name):
    return importlib.import_module(f"experiments.{name}.study").EXPERIMENT


def cheapest(study):
    """The study with its first cell alone."""
    return dataclasses.replace(study, points=study.points[:1], baseline=None)


@pytest.mark.parametrize("name", tables.STUDIES)
def test_every_size_of_a_study_makes_runs(name):
    study = load(name)
    for size in study.sizes.values():
        assert size.seeds >= table.FEWEST_SEEDS
        assert len({tuple(row.labels) for row in size.rows}) == 1
        assert all(list(rates) == sorted(set(rates)) for rates in map(size.rates_of, size.rows))
    for size in study.sizes:
        assert study.get_study(f"{size},rates").cells()
    [cost] = sweep_plan.cell_costs(cheapest(study.get_study("paper,rates")), devices.parse_device("b200:8"))
    assert cost.fits
    assert cost.operations > 1e15


@pytest.mark.parametrize(("name", "groups"), [("lora_targets", [range(9)]), ("bitfit", [(0, 2), (1, 3)])])
def test_rows_of_equal_budget_train_exactly_as_many_parameters(name, groups):
    study = load(name).get_study("small,rates")
    points = {json.dumps(point["method"]): point for point in study.points}
    base = {**study.base, "model": {**study.base["model"]}, "data": {**study.base["data"], "labels": list("abcde")}}
    base["model"]["name"], base["mesh"] = "experiments/paper_models/minilm-l6", {"data": 1}
    alone = dataclasses.replace(study, base=base, points=tuple(points.values()), baseline=None)
    runs = [run for _, run in checked_runs(alone.cells(), jax.devices()[:1])]
    counts = [parameter_summary.count_parameters(run.shapes, run.mask)["trained_params"] for run in runs]
    assert all(len({counts[i] for i in group}) == 1 for group in groups)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run()`: the command of a ci study whose cells have scores of a formula in place of training; its exit code."""

    def run_cells(words):
        options = dict(word.removeprefix("--").split("=", 1) for word in words)
        study = open_study(sweep.load_study(options["study"]), as_path(options["folder"]))
        return Worker(study, dummy_cells.command(FAKE), say=lambda line: None, poll=0.01).run()

    monkeypatch.setattr(command.sweep, "main", run_cells)
    words = ["--size=ci", f"--folder={tmp_path}/sweeps", f"--results={tmp_path}/results"]
    return lambda *more: command.main(load("bitfit"), [*words, *more])


def test_a_study_searches_its_rates_and_writes_the_table_of_the_best(run, tmp_path, capsys):
    assert run("--workers=0") == 1
    assert "the phase rates has not started" in capsys.readouterr().out
    assert run() == 0
    rates = list(csv.DictReader((tmp_path / "results" / "rates.csv").read_text().splitlines()))
    assert [(line["trained"], line["lr"], line["edge"]) for line in rates] == [
        ("all biases", "0.01", "True"),
        ("biases of q and up", "0.01", "True"),
    ]
    rows = table.read_rows(tmp_path / "results" / "table.csv")
    assert [(row["lr"], row["seeds"], row["printed_MNLI"]) for row in rows] == [
        ("0.01", "3", "84.7"),
        ("0.01", "3", ""),
    ]
    assert "Not decided" in capsys.readouterr().out
    assert (tmp_path / "results" / "plot.png").stat().st_size > 1000
    text = table.markdown(load("bitfit"), tmp_path / "results")
    assert "| all biases | 0.01* | 3 | 0.901 ± 0.002 | - | 7 | 84.7 | 85.2 |" in text
    assert run("--workers=0") == 0  # the tables alone, from what is done


def test_a_cell_of_a_study_trains_and_is_scored(files, tmp_path):
    study = cheapest(load("bitfit").get_study("ci,rates"))
    config = study.cells()[0].config | {"mesh": {"data": 1}, "method": {"name": "full"}}  # the tiny model has no pooler
    config["model"] |= {"name": str(files / "bert")}
    config["data"] |= {"source": f"jsonl:{files / 'records.jsonl'}", "batch_size": 4}
    config["eval"] |= {"split": "train"}
    summary = loop.run(config, tmp_path / "run")
    assert 0 <= summary["after"][study.metric] <= 1
    assert summary["trained_params"] > 0


def test_every_row_meets_the_baseline_that_shares_its_labels():
    study = load("data_size")
    size = dataclasses.replace(study.small, seeds=3)
    scores = [0.5 + 0.1 * i + 0.01 * seed * (i + 1) for i in range(len(size.rows)) for seed in range(3)]
    results = [Scored(seed % 3, score) for seed, score in enumerate(scores)]
    found = table.differences(study, size, results)
    assert_close(np.array([line["minus_baseline"] for line in found]), np.array([0, 0.11, 0.22] * 3), relative=1e-9)
    assert [math.isnan(line["p_holm"]) for line in found] == [True, False, False] * 3


def test_rows_that_differ_are_told_apart():
    study = load("bitfit")
    line = {"trained": "all biases", "score_mean": "0.9", "p_holm": "nan", "minus_baseline": "0"}
    worse = {**line, "trained": "everything", "p_holm": "0.01", "minus_baseline": "-0.1"}
    tied = {**line, "trained": "fewer random entries", "p_holm": "0.2", "minus_baseline": "0.1"}
    assert table.conclusion(study, [line, worse, tied]) == (
        "By accuracy, compared with all biases: everything worse; not decided: fewer random entries."
    )
    better = {**worse, "minus_baseline": "0.1"}
    assert table.conclusion(study, [line, better]) == "By accuracy, compared with all biases: everything better."
    assert table.conclusion(study, [line, tied]).startswith("Not decided")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("smal", "unknown size 'smal' .did you mean 'small'"),
        ("ci,rate", "unknown phase 'rate' .did you mean 'rates'"),
        ("ci,final,x,all biases,y", "is not SIZE,PHASE,RESULTS,ROW"),
        ("ci,final,x,all bias", "unknown row 'all bias' .did you mean 'all biases'"),
        ("ci,final,NONE", "rates.csv is missing: python -m experiments.bitfit --size=ci searches"),
    ],
)
def test_an_argument_that_makes_no_study_is_named(arg, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load("bitfit").get_study(arg.replace("NONE", str(tmp_path)))


def test_rates_of_other_rows_are_refused(tmp_path):
    study, size = load("bitfit"), load("bitfit").size("ci")
    (tmp_path / experiment.RATES_FILE).write_text("trained,lr\nall biases,0.1\neverything,0.1\n")
    with pytest.raises(UserError, match="is of other rows than the study"):
        study.get_study(f"ci,final,{tmp_path}")
    (tmp_path / experiment.RATES_FILE).write_text("trained,lr\nall biases,0.1\nbiases of q and up,0.2\n")
    final = study.get_study(f"ci,final,{tmp_path}")
    assert [point[RATE] for point in final.points] == [0.1] * size.seeds + [0.2] * size.seeds
    assert final.base["eval"]["split"] == "test"
