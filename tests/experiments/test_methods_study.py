"""The comparison of methods: every method has a row, and the catalogue says what a row trains and whether it merges."""

import pytest

from experiments.methods import catalogue, headlines, topics
from experiments.methods.rows import GRID, ROWS, Row
from experiments.protocol.marks import earlier_mark, same_mark
from experiments.quantization import rows as quantization
from lowrank import methods
from tests.support import tiny_checkpoint as tiny


def test_the_catalogue_says_what_merges_and_how_much_is_trained(tmp_path):
    model = str(tiny.llama(tmp_path / "llama"))
    lora, prompt, head = (catalogue.entry(ROWS[name], model) for name in ("lora", "prompt", "head"))
    width = tiny.WIDTH
    kv = width // tiny.HEADS * tiny.KV_HEADS
    assert (lora["merges"], lora["trained_params"]) == (True, tiny.LAYERS * 8 * (width + width + width + kv))
    assert (prompt["merges"], prompt["trained_params"]) == (False, 20 * width)
    assert (head["merges"], head["trained_params"]) == (True, len(tiny.vocabulary()) * width)
    assert catalogue.entry(Row("x", {"name": "lora", "rank": 1000}), model)["why"].startswith("rank 1000")


def test_every_method_has_a_row_and_every_row_a_rate_in_the_middle_of_its_search():
    rows = [*ROWS.values(), *quantization.ROWS.values()]
    assert {row.method["name"] for row in rows} == set(methods.METHODS)
    for name, row in ROWS.items():
        assert methods.build_method(row.method), name
        assert row.tasks, name
        for task in row.tasks:
            assert len(row.rates(task)) == 3, name
            assert set(row.rates(task)) <= set(GRID), name


def test_the_studies_hold_the_rows_of_their_tasks():
    for study in (topics.EXPERIMENT, headlines.EXPERIMENT):
        named = {row.name: row for row in study.small.rows}
        assert set(named) == {name for name, row in ROWS.items() if study.task in row.tasks}
        assert named["full"].rates == (1e-4, 3e-4, 1e-3)
        assert study.small.seeds_of(named["lora"]) == 5
    assert {row.name: row.point for row in headlines.EXPERIMENT.small.rows}["perft"]["model.upcycle"]["experts"] == 4


@pytest.mark.parametrize(
    ("mean", "half", "p", "mark"),
    [
        ("nan", "nan", "nan", ""),  # the baseline
        ("0.2", "0.1", "0.06", " ≈"),
        ("0.2", "0.3", "0.04", ""),  # Holm's p value decides
        ("0.2", "0.1", "", ""),
        ("-0.2", "0.3", "nan", " ≈"),
        ("0.2", "0", "nan", " ≈"),  # pairs that all differ alike say nothing of the noise
    ],
)
def test_a_row_that_is_not_told_from_the_baseline_is_marked(mean, half, p, mark):
    row = {"minus_lora_mean": mean, "minus_lora_ci95": half, "p_holm": p, "earlier": "True"}
    assert same_mark(row, "minus_lora") == mark
    assert earlier_mark(row) == " †"
    assert earlier_mark({"earlier": False}) == ""
