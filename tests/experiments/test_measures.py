"""Further numbers of a study's models: their statistics and tables, and the formulas of single studies."""

import collections
import dataclasses
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.dora import decomposition
from experiments.forgetting.study import EXPERIMENT
from experiments.formats_task.study import score_texts
from experiments.intrinsic_dimension import bisection, command, search, table
from experiments.ladder import questions
from experiments.ladder import study as ladder
from experiments.protocol import measures, models, plot
from lowrank import pretrained
from lowrank.core.files import write_json
from lowrank.sweeps import results as sweep_results
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.tables import write_csv
from tests.support.close import assert_close


def test_measures_have_statistics_over_the_seeds(tmp_path, monkeypatch):
    """Two rows of three seeds: the baseline, and one that differs by 1, 2 and 3."""
    experiment = dataclasses.replace(EXPERIMENT, baseline={"method": "a"})
    write_csv(tmp_path / "table.csv", ["method"], [{"method": "a"}, {"method": "b"}])
    cells = [Cell(f"{row}{seed}", {"method": row, "seed": seed}, {"seed": seed}) for row in "ab" for seed in range(3)]
    study = SimpleNamespace(cells=cells, run_path=lambda key: tmp_path / key)
    for i, cell in enumerate(cells):
        write_json(tmp_path / cell.key / measures.CELL_FILE, {"rise": float(i % 3 + (i > 2) * (1 + i % 3))})
    monkeypatch.setattr(measures, "load_model", lambda config: config)
    measures.write(experiment, study, tmp_path, lambda model: {"rise": 7.0})
    rows = measures.read_rows(tmp_path / measures.MEASURES_FILE)
    assert [(row["method"], row["seeds"], row["rise_mean"]) for row in rows] == [
        ("a", "3", "1"),
        ("b", "3", "3"),
        ("untrained", "", "7"),
    ]
    assert rows[1]["rise_minus_baseline"] == "2"
    assert_close(float(rows[1]["rise_p_holm"]), 0.0742, relative=1e-3)  # t = 3.46 with 2 degrees of freedom
    text = measures.markdown(experiment, tmp_path, {"rise": measures.Heading("rise of perplexity", "min")})
    assert "| b | 3.000 ± 4.968 ≈ |" in text
    assert "| untrained | 7.000 |" in text
    assert "Not decided: these seeds tell no row from a by rise of perplexity." in text


def test_a_change_of_a_kernel_is_taken_apart_into_length_and_direction():
    """Columns of length 5: the first is stretched to 7, the second turned by a right angle, in one of two layers."""
    before = np.array([[[3.0, 0.0], [4.0, 5.0]]] * 2)
    after = np.array([before[0], [[4.2, 5.0], [5.6, 0.0]]])
    found = decomposition.decompose(before, after)
    assert_close(found.magnitude, [0.0, 1.0])
    assert_close(found.direction, [0.0, 0.5])
    assert_close([found.slope, found.correlation], [2.0, 1.0])


def test_a_fact_is_cut_out_of_the_first_sentence():
    text = "Profits at US media giant Time Warner jumped 76% in the last quarter.\n\nIt made 1.13bn dollars."
    question = "Profits at US media giant ____ jumped 76% in the last quarter."
    assert questions.ask("Ad sales boost profit", text) == (question, "Time Warner")
    assert questions.ask("Time Warner profit", text) == (text.split("\n")[0].replace("76%", "____"), "76%")
    assert questions.ask("Ad sales", "Nothing of note happened.\n\nTime Warner slept.") is None


def test_the_passage_that_holds_the_answer_is_found():
    passages = questions.Passages(["Rain fell on Leeds.", "Time Warner made a profit.", "A new film opened."])
    assert passages.find("The media giant ____ made a profit") == "Time Warner made a profit."


def test_a_rung_is_compared_with_the_bare_prompt_by_question():
    """Three of four questions are right on the second rung, and none on the first."""
    none, most = (dict.fromkeys(ladder.SCORES, right) for right in ([0.0] * 4, [1.0, 1.0, 1.0, 0.0]))
    first, second = ladder.ladder_rows({"prompt": none, "retrieval": most})
    assert (first["fact_mean"], second["fact_mean"], second["fact_minus"]) == (0.0, 0.75, 0.75)
    assert math.isnan(first["fact_p_holm"])
    assert second["fact_p_holm"] == 0.25  # three of three that differ
    assert ladder.score('{"answer": "Time Warner"}', "Time Warner") == {"json": 1.0, "fact": 1.0, "both": 1.0}
    assert ladder.score("it is Time Warner", "Time Warner") == {"json": 0.0, "fact": 1.0, "both": 0.0}


@pytest.mark.parametrize("name", ["dora", "forgetting", "formats_task", "ladder", "prompt_length"])
def test_every_plot_is_drawn_from_the_rows_of_its_tables(name):
    study = importlib.import_module(f"experiments.{name}.study").EXPERIMENT
    rows = [collections.defaultdict(lambda: "1.5", row.labels) for row in study.small.rows]
    assert study.plot(study, rows).startswith(b"\x89PNG")


@pytest.mark.parametrize("found", [(20.0, 16.0, 25.0), (math.nan, math.nan, math.nan)])
def test_a_range_is_drawn_where_the_search_found_one(found):
    assert plot.draw_ranges(["found or not", "never"], [found, (math.nan,) * 3], "d90").startswith(b"\x89PNG")


def test_a_few_shot_prompt_shows_answered_examples_first():
    examples = [{"question": f"q{i}", "answer": f"a{i}", "passage": f"p{i}"} for i in range(4)]
    [prompt] = ladder.prompts(ladder.RUNGS[3], [{"question": "asked", "passage": "shown"}], examples)
    assert prompt.count('{"answer": "a') == 3
    assert prompt.endswith("Passage: shown\n\nNews: asked\nJSON:")


def test_the_first_blocks_of_a_model_are_a_checkpoint(files, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    whole = pretrained.load(str(files / "bert"))
    first = pretrained.load(str(models.write_first_blocks(str(files / "bert"), 1)))
    assert first.config.layers == 1 < whole.config.layers
    kernel = lambda base: base.params["layers"]["attn"]["q"]["kernel"]  # noqa: E731
    np.testing.assert_array_equal(kernel(first), kernel(whole)[:1])


def test_answers_in_json_are_scored_by_validity_and_by_content():
    wanted = '{"section": "tech", "headline": "Net users"}'
    texts = [
        wanted,
        f"{wanted} and more",
        '{"section": "tech"}',
        '{"section": "business", "headline": "Net users"}',
        "[1]",
    ]
    assert score_texts(texts, [wanted] * 5) == {
        "valid": 0.8,
        "keys": 0.4,
        "section": 0.4,
        "headline": 0.4,
        "exact": 0.2,
    }


@pytest.mark.parametrize("d90", [16, 32, 64, 128, None])
def test_a_bisection_finds_the_smallest_dimension_that_is_enough(d90):
    candidates, reached = (16, 32, 64, 128), {}
    while dimension := bisection.next_dimension(candidates, reached):
        reached[dimension] = d90 is not None and dimension >= d90
    assert bisection.smallest(candidates, reached) == d90
    assert len(reached) <= 3


def test_the_search_of_every_seed_goes_on_from_the_trials_that_are_recorded(tmp_path):
    """Two rows of two seeds; a run reaches the accuracy in 32 dimensions and not in 16, but for one of the seeds."""
    size = search.CI
    accuracy = lambda point: 0.9 if point["method"]["dim"] > 16 or point["seed"] == 1 else 0.1  # noqa: E731

    def results(phase):
        points = search.get_study(f"ci,{phase},{tmp_path}").points
        cells = [Cell(str(i), point, {"seed": point["seed"]}) for i, point in enumerate(points)]
        history = SimpleNamespace(last={"summary": {}})
        score = (lambda point: 1.0) if phase == "full" else accuracy
        return [sweep_results.Result(cell, history, "done", score(cell.point)) for cell in cells]

    for phase, record in command.RECORD.items():
        record(size, results(phase), tmp_path)
    assert command.longest_search(size) == 2
    command.RECORD["bisect"](size, results("bisect"), tmp_path)
    assert search.bisection_points(size, tmp_path) == ()
    table.write_table(size, tmp_path)
    [first, said] = table.read_rows(tmp_path / "table.csv")
    assert first["by_seed"] == said["by_seed"] == "32 16"
    assert_close(float(first["d90"]), math.sqrt(16 * 32), relative=1e-5)
    assert "Not decided" in table.markdown(tmp_path)
