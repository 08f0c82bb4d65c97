"""Tables and status of a study whose scores are known."""

import csv

import pytest
from scipy import stats
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing import plugin_event_multiplexer as event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from lowrank.sweeps import hparams, tables
from lowrank.sweeps.axes import axis, product, seeds
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.report_page import write_page
from lowrank.sweeps.results import read_results
from lowrank.sweeps.status import Status
from lowrank.sweeps.study import Halving
from lowrank.sweeps.tables import table_rows, write_tables
from tests.support import dummy_cells
from tests.support.close import assert_close

SCORES = {1: [4.0, 4.1, 4.3], 2: [3.0, 3.2, 3.1], 4: [3.02, 3.2, 3.12]}  # by rank, of three seeds
POINTS = product(axis("method.rank", list(SCORES)), seeds(3))


def close(study, cell, state, **facts):
    ledger = Ledger(study.path, study.limits)
    claim = ledger.claim(ledger.histories([cell.key])[cell.key], "me", 0.0)
    ledger.close(claim, state, code="abc", **facts)


@pytest.fixture
def study(tmp_path):
    return filled(tmp_path)


def filled(folder, **settings):
    """A study whose cells are done, but for the last one, which has diverged."""
    study = open_study(dummy_cells.make_study(points=POINTS, metric="perplexity", **settings), folder)
    for cell in study.cells[:-1]:
        score = SCORES[cell.config["method"]["rank"]][cell.config["seed"]]
        close(study, cell, "done", summary={"after": {"perplexity": score}, "trained_params": 1000, "seconds": 2.0})
    close(study, study.cells[-1], "diverged", why="exit code 3: loss is nan")
    return study


def test_tensorboard_shows_the_axes_and_the_means_over_the_seeds(study, tmp_path):
    multiplexer = event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(hparams.write_hparams(study, read_results(study, 0.0))))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    tab = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    experiment = get_experiment.Handler(RequestContext(), tab, "", api_pb2.GetExperimentRequest()).run()
    [axis_info] = experiment.hparam_infos
    assert axis_info.name == "method.rank"
    assert (axis_info.domain_interval.min_value, axis_info.domain_interval.max_value) == (1, 4)
    states = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    request = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=states)
    groups = list_session_groups.Handler(RequestContext(), tab, "", request).run().session_groups
    found = {group.hparams["method.rank"].number_value: group for group in groups}
    assert sorted(found) == [1, 2, 4]
    assert sorted(session.status for session in found[4].sessions) == sorted([states[0], *states])
    for rank, of in ((1, SCORES[1]), (4, SCORES[4][:2])):
        shown = {value.name.tag: value.value for value in found[rank].metric_values}
        assert_close(shown["perplexity"], sum(of) / len(of), relative=1e-6)
        assert shown["seconds"] == 2.0


def test_rows_are_means_over_seeds_with_paired_differences(study):
    first, best, third = table_rows(study, read_results(study, 0.0))
    assert (first["seeds"], third["seeds"], third["not_done"]) == (3, 2, "1 diverged")
    assert_close(first["perplexity_mean"], 12.4 / 3, relative=1e-9)
    assert best["is_baseline"]  # the best mean, as the study names none
    pairs = stats.ttest_rel(SCORES[1], SCORES[2])
    assert_close(first["p_holm"], min(1.0, 2 * pairs.pvalue), relative=1e-9)  # two rows are compared
    assert_close(third["minus_baseline"], 0.01, relative=1e-9)


def test_the_table_is_written_in_three_formats(study, tmp_path):
    paths = write_tables(study, read_results(study, 0.0), tmp_path / "tables")
    assert [path.name for path in paths] == ["table.csv", "table.md", "table.tex"]
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [row["method.rank"] for row in rows] == ["1", "2", "4"]
    assert rows[0]["perplexity_mean"] == "4.13333"
    markdown, latex = paths[1].read_text(), paths[2].read_text()
    assert "| 2 | 3 | 3.100 ± 0.248 | - | 1,000 | 2.0 |" in markdown
    assert "| 4 | 2 (1 diverged) | 3.110 ± 1.144 | 0.010 ± 0.127 ≈ |" in markdown
    assert "1.033 ± 0.379 |" in markdown  # no mark: it can be told from the best
    assert "chosen by these same scores" in markdown
    assert "halving" not in markdown
    assert latex.count(r"\\") == 4
    assert r"2 & 3 & 3.100 $\pm$ 0.248 & - &" in latex
    assert latex.startswith("\\begin{tabular}{lrrrrr}\n\\toprule\nmethod.rank & seeds & perplexity")


def test_the_page_is_one_file_with_every_row_and_cell(study, tmp_path):
    page = write_page(study, read_results(study, 0.0), tmp_path).read_text()
    assert page.count("<tr>") == 1 + 3 + 1 + 9
    assert '<td class="number">3.100 ± 0.248</td>' in page
    assert "<td>exit code 3: loss is nan</td>" in page
    assert "://" not in page


def test_text_of_a_run_cannot_be_markup_of_the_page(tmp_path):
    study = open_study(dummy_cells.make_study(1), tmp_path)
    close(study, study.cells[0], "refused", why="<script>alert(1)</script>")
    page = write_page(study, read_results(study, 0.0)).read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_a_baseline_and_halving_are_stated(tmp_path):
    study = filled(tmp_path, baseline={"method.rank": 1}, halving=Halving())
    rows = table_rows(study, read_results(study, 0.0))
    assert [row["is_baseline"] for row in rows] == [True, False, False]
    text = write_tables(study, read_results(study, 0.0))[1].read_text()
    assert "Successive halving stopped poor cells early (grace=1 and reduction=4)" in text
    assert "Differences from the baseline are taken" in text


def test_the_status_counts_states_and_shows_steps_and_time_left(tmp_path):
    study = open_study(dummy_cells.make_study(4), tmp_path)
    ledger, cells = Ledger(study.path, study.limits), study.cells
    claim = ledger.claim(ledger.histories([cells[0].key])[cells[0].key], "me", 0.0)
    ledger.renew(claim, {"steps": 8, "step": 2, "seconds": 30.0})
    close(study, cells[1], "failed", why="exit code 1: out of memory")
    close(study, cells[2], "done", summary={"final_loss": 1.5})
    status = Status(study)
    assert status.headline() == "dummy: 4 cells, 1 done, 1 running, 1 waiting, 1 failed"
    lines = status.text().splitlines()
    assert [line.split()[2:] for line in lines[3:]] == [
        ["running", "2/8", "01:30", "by", "me"],
        ["failed", "1", "failure;", "exit", "code", "1:", "out", "of", "memory"],
        ["done", "score", "1.5"],
        ["waiting"],
    ]
    assert not status.finished


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (0.9268, 0.0259, "0.927 ± 0.026"),
        (0.0040963, 0.00025409, "0.00410 ± 0.00025"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (0.5, float("nan"), "0.500"),
        (float("nan"), 0.1, ""),
        (12345.6, 0.0001, "1.23e+04 ± 1.00e-04"),
    ],
)
def test_an_interval_is_shown_by_digits_of_its_own(mean, spread, text):
    assert tables.format_mean(mean, spread) == text
