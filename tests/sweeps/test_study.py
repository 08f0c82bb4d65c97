"""A study as a file and as a folder: what it holds is recorded, and another version is never mixed with it."""

import dataclasses

import pytest

from lowrank.core.errors import UserError
from lowrank.sweeps.axes import axis
from lowrank.sweeps.folder import check_folder, open_study, read_folder
from lowrank.sweeps.study import Halving, Limits, load_study
from tests.support import dummy_cells

FILE = """
from configs import tiny
from lowrank.sweeps.axes import axis
from lowrank.sweeps.study import Study
def get_study(arg=None):
    return Study("one", tiny.get_config(), axis("steps", [int(arg or 3)]))
"""


def test_a_study_is_a_file_with_an_argument(tmp_path):
    (tmp_path / "study.py").write_text(FILE)
    assert load_study(f"{tmp_path}/study.py").cells()[0].config["steps"] == 3
    assert load_study(f"{tmp_path}/study.py:5").cells()[0].config["steps"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "study file '.*study.py' cannot be read"),
        ("import nothing_of_this_name", "is not a study: No module named"),
        ("def get_stdy(): pass", r"'get_study' \(did you mean 'get_stdy'\?\)"),
        ("def get_study(): return 3", "returns a int, not a Study"),
    ],
)
def test_a_file_that_holds_no_study_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "study.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(f"{tmp_path}/study.py")


def test_a_folder_gives_its_study_back(tmp_path):
    study = dummy_cells.make_study(3, halving=Halving(2, 3), limits={"lease": 7.0}, metric="perplexity")
    found = open_study(study, tmp_path)
    assert (found.name, found.metric, found.mode, found.halving) == ("dummy", "perplexity", "min", Halving(2, 3))
    assert [cell.key for cell in found.cells] == [cell.key for cell in study.cells()]
    assert read_folder(tmp_path) == found
    changed = dataclasses.replace(study, limits=Limits(lease=9.0))
    assert open_study(changed, tmp_path).limits.lease == 9.0  # limits are of a start, not of the study


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"points": axis("seed", [0, 1])}, "with 3 cells there, .* with 2 cells here, seed=2 only there"),
        ({"points": axis("seed", [0, 1, 2, 3])}, "with 4 cells here, seed=3 only here"),
        ({"metric": "perplexity"}, "metric is 'final_loss' there and 'perplexity' here"),
        ({"name": "other"}, "holds another version of the study: name is 'dummy' there"),
    ],
)
def test_a_folder_of_another_version_is_named_and_left_alone(other, message, tmp_path):
    study = dummy_cells.make_study(3)
    open_study(study, tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    for use in (check_folder, open_study):
        with pytest.raises(UserError, match=message):
            use(dataclasses.replace(study, **other), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a study: it has no study\.json"):
        read_folder(tmp_path)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="grace >= 1 and reduction >= 2, not 0 and 4"):
        Halving(grace=0)
    with pytest.raises(UserError, match=r"limits\.lease=0\.0 is too small"):
        Limits(lease=0.0)
    with pytest.raises(UserError, match="mode to min or max for metric=rougeL"):
        dummy_cells.make_study(metric="rougeL").better()
    with pytest.raises(UserError, match=r"baseline method\.rank=3 is the point of none"):
        dummy_cells.make_study(baseline={"method.rank": 3}).cells()
