"""The comparison of methods: cells are kept, the best rate is found on validation, the table says what the cells do."""

import csv
import dataclasses

import numpy as np
import pytest

from experiments.methods import __main__ as methods_study
from experiments.methods import catalogue, table
from experiments.methods.rows import ROWS
from experiments.quantization import rows as quantization
from experiments.study import compute_cost, numbers, run, stages, tasks
from experiments.study.study import GRID, Row, Study
from experiments.study.timing import Timing
from experiments.study.trials import Cell
from lowrank import methods
from lowrank.core import files
from lowrank.core.errors import Diverged, UserError
from lowrank.training import loop
from tests.support import study_tasks as studies
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close


@pytest.fixture
def study(tmp_path, monkeypatch):
    studies.shrink(tmp_path, monkeypatch)
    return Study("methods", ROWS, tmp_path / "results", tmp_path / "runs", quick=True)


def test_a_row_leaves_cells_a_table_and_a_plot(study):
    run.run(study, methods_study.write, ["topics"], ["lora"])
    found = list(csv.DictReader((study.results / "table.csv").read_text().splitlines()))
    assert tuple(found[0]) == table.COLUMNS
    assert [(r["method"], r["task"], r["seeds"]) for r in found] == [("lora", "topics", "1")]
    assert all(float(r["step_s"]) > 0 and float(r["adapter_kb"]) > 0 and float(r["score_mean"]) > 0 for r in found)
    assert (study.results / "accuracy.png").stat().st_size > 1000
    assert "lora" in (study.results / "table.tex").read_text()
    assert not (study.runs / "topics" / "lora").exists()
    Timing(study, tasks.TOPICS, "lora").path.unlink()
    methods_study.write(study)
    assert "| - | - |" in (study.results / "table.md").read_text()  # scored, not timed


def test_cells_that_are_done_are_not_run_again(study, monkeypatch):
    task = tasks.TASKS["headlines"]
    assert len(list(stages.scores(study, task, "lora"))) == 2  # the sweep's one run, and its judgement
    monkeypatch.setattr(Cell, "run", lambda self: pytest.fail("ran again"))
    assert not list(stages.scores(study, task, "lora"))
    changed = {"lora": ROWS["lora"]._replace(method={"name": "lora", "rank": 2})}
    assert stages.missing_runs(dataclasses.replace(study, rows=changed), "scores", task, "lora") == 1


def test_only_the_seed_that_chooses_the_rate_is_scored_on_validation(study):
    first = Cell(study, tasks.TASKS["topics"], "lora", 0.003, 0)
    other = dataclasses.replace(first, seed=1)
    assert set(first.score_on_test()) - set(other.score_on_test()) == {"validation"}


def test_a_study_may_run_a_task_shorter(tmp_path):
    shorter = Study("methods", ROWS, tmp_path, tmp_path, settings={"headlines": {"steps": 3, "data.batch_size": 2}})
    config = shorter.config(tasks.HEADLINES, ROWS["lora"], 0.01, 1)
    assert (config.steps, config.data.batch_size, config.optim.lr, config.seed) == (3, 2, 0.01, 1)
    assert shorter.config(tasks.TOPICS, ROWS["lora"], 0.01, 1) == tasks.TOPICS.config(ROWS["lora"], 0.01, 1)
    quick = dataclasses.replace(shorter, quick=True).config(tasks.HEADLINES, ROWS["lora"], 0.01, 1)
    assert (quick.steps, quick.data.batch_size) == (2, 2)


def _keep(cell, score):
    files.write_json(cell.path, {"config": files.to_json(cell.config), "validation": score})


def test_the_best_rate_is_the_one_with_the_best_validation_score(tmp_path):
    rates = {"lora": ROWS["lora"]._replace(rates=(1e-3, 3e-3, 1e-2))}
    fixed = Study("methods", rates, tmp_path, tmp_path)
    for task, better in ((tasks.TOPICS, max), (tasks.HEADLINES, min)):
        swept = stages.sweep(fixed, task, "lora")
        for cell, score in zip(swept, (3.0, 5.0, 4.0), strict=True):
            _keep(cell, score)
        chosen = better(zip((3.0, 5.0, 4.0), swept, strict=True))[1]
        assert {c.lr for c in stages.final_cells(fixed, task, "lora")} == {chosen.lr}
        assert [c.seed for c in stages.final_cells(fixed, task, "lora")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("accuracy", "tried", "chosen"),
    [
        ({1e-3: 0.4, 3e-3: 0.9, 1e-2: 0.8}, [3e-3, 1e-2, 1e-3], 3e-3),
        ({3e-3: 0.7, 1e-2: 0.8, 3e-2: 0.9, 1e-1: 0.2}, [3e-3, 1e-2, 3e-2, 1e-1], 3e-2),
        ({3e-4: 0.5, 1e-3: 0.8, 3e-3: 0.7, 1e-2: None}, [3e-3, 1e-2, 1e-3, 3e-4], 1e-3),  # one diverged
        ({1e-3: 0.9, 3e-3: 0.9, 1e-2: 0.9}, [3e-3, 1e-2, 1e-3], 3e-3),
    ],
)
def test_a_search_ends_between_two_worse_rates(tmp_path, accuracy, tried, chosen):
    study = Study("methods", ROWS, tmp_path, tmp_path, search=True)
    while missing := [cell for cell in stages.sweep(study, tasks.TOPICS, "lora") if cell.read() is None]:
        assert not stages.final_cells(study, tasks.TOPICS, "lora")
        assert stages.missing_runs(study, "scores", tasks.TOPICS, "lora") >= 3
        _keep(missing[0], accuracy[missing[0].lr])
    assert [cell.lr for cell in stages.sweep(study, tasks.TOPICS, "lora")] == tried
    assert {cell.lr for cell in stages.final_cells(study, tasks.TOPICS, "lora")} == {chosen}


def test_a_row_is_told_from_lora_by_the_differences_at_its_seeds(tmp_path):
    rates = {name: ROWS[name]._replace(rates=(1e-3,), tasks=("topics",)) for name in ("lora", "vera", "head")}
    study = Study("methods", rates, tmp_path, tmp_path)
    scores = {"lora": (0.5, 0.7, 0.9), "vera": (0.61, 0.8, 1.0), "head": (0.3, 0.9, 0.6)}
    for name, values in scores.items():
        for cell, score in zip(_seeds(study, name), values, strict=True):
            found = {"validation": 0.5, "test": score, "known": 0.0, "trained_params": 1, "adapter_kb": 1.0}
            files.write_json(cell.path, {"config": files.to_json(cell.config), **found})
    rows = {row["method"]: row for row in table.rows(study, lambda task: 0.0)}
    differences = np.array([0.11, 0.1, 0.1])
    assert_close(rows["vera"]["minus_lora_mean"], differences.mean(), relative=1e-9)
    half = (
        4.302652729749464 * differences.std(ddof=1) / np.sqrt(3)
    )  # Student's, of the pairs: far less than of either row
    assert_close(rows["vera"]["minus_lora_ci95"], half, relative=1e-9)
    assert {name: numbers.same_mark(row) for name, row in rows.items()} == {"lora": "", "vera": "", "head": " ≈"}


def _seeds(study, name):
    return [Cell(study, tasks.TOPICS, name, 1e-3, seed) for seed in study.seeds]


def test_scores_of_earlier_formulas_are_marked_until_they_are_renewed(study):
    task = tasks.TASKS["topics"]
    assert list(stages.scores(study, task, "lora"))
    changed = dataclasses.replace(study, rows={"lora": ROWS["lora"]._replace(formulas={"topics": 1})})
    renewed = dataclasses.replace(changed, renew=True)
    assert [stages.missing_runs(s, "scores", task, "lora") for s in (changed, renewed)] == [0, 1]
    assert [numbers.earlier_mark(row) for row in table.rows(changed, lambda task: 0.0)] == [" †"]
    assert list(stages.scores(renewed, task, "lora"))
    assert [numbers.earlier_mark(row) for row in table.rows(changed, lambda task: 0.0)] == [""]
    assert not stages.missing_runs(renewed, "scores", task, "lora")


def test_a_run_that_diverges_is_kept_without_a_score(study, monkeypatch):
    def diverge(config, folder, **scored):
        raise Diverged("loss is nan at step 3")

    monkeypatch.setattr(loop, "run", diverge)
    [cell] = stages.sweep(study, tasks.TOPICS, "lora")
    cell.run_or_record_divergence()
    assert (cell.read()["validation"], cell.read()["why"]) == (None, "loss is nan at step 3")
    with pytest.raises(UserError, match="nan at step 3"):
        list(stages.scores(study, tasks.TOPICS, "lora"))


def test_the_table_says_what_its_cells_took(study):
    cells = [*stages.sweep(study, tasks.TOPICS, "lora"), Timing(study, tasks.TOPICS, "lora")]
    for cell in cells:
        _keep(cell, 0.9)
        assert compute_cost.cost_summary(study, tasks.TOPICS, ["lora"]) == ""
    for cell in cells:
        compute_cost.add_core_seconds(cell, 60)
        compute_cost.add_core_seconds(cell, 120)
    minutes = 2 * 3 * len(compute_cost.cores()) / 2
    assert compute_cost.cost_summary(study, tasks.TOPICS, ["lora"]) == f"2 runs, {minutes:.0f} minutes on two cores."


def test_the_catalogue_says_what_merges_and_how_much_is_trained(tmp_path):
    model = str(tiny.llama(tmp_path / "llama"))
    lora, prompt, head = (catalogue.entry(ROWS[name], model) for name in ("lora", "prompt", "head"))
    width = tiny.WIDTH
    kv = width // tiny.HEADS * tiny.KV_HEADS
    assert (lora["merges"], lora["trained_params"]) == (True, tiny.LAYERS * 8 * (width + width + width + kv))
    assert (prompt["merges"], prompt["trained_params"]) == (False, 20 * width)
    assert (head["merges"], head["trained_params"]) == (True, len(tiny.vocabulary()) * width)
    assert catalogue.entry(Row("x", {"name": "lora", "rank": 1000}, ()), model)["why"].startswith("rank 1000")


def test_every_method_has_a_row_and_every_row_a_rate_to_start_from():
    rows = [*ROWS.values(), *quantization.ROWS.values()]
    assert {entry.method["name"] for entry in rows} == set(methods.METHODS)
    for name, entry in ROWS.items():
        assert isinstance(entry, Row)
        assert methods.build_method(entry.method), name
        assert len(entry.rates) == 1
        assert set(entry.rates) <= set(GRID)
        assert set(entry.tasks) <= set(tasks.TASKS)


def test_an_unknown_row_is_refused(study):
    with pytest.raises(UserError, match=r"unknown row 'lara' \(did you mean 'lora'\?\)"):
        run.run(study, methods_study.write, ["topics"], ["lara"])
    with pytest.raises(UserError, match=r"unknown task 'topic' \(did you mean 'topics'\?\)"):
        run.run(dataclasses.replace(study, settings={"topic": {"steps": 3}}), methods_study.write, ["topics"], ["lora"])
