"""A folder belongs to one config, and its files are whole or absent."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lowrank.core.errors import InUse, UserError
from lowrank.core.files import write_bytes, write_json, write_text
from lowrank.training import workdir
from lowrank.training.workdir import claim

CONFIG = {"seed": 0, "optim": {"lr": 1e-3, "betas": (0.9, 0.99)}, "mesh": {"data": 1}, "log_every": 10}


def changed(**groups):
    return {**CONFIG, **groups}


def test_the_first_run_leaves_its_config(tmp_path):
    path = claim(tmp_path / "a" / "run", ConfigDict(CONFIG))
    assert path == tmp_path / "a" / "run"
    assert json.loads((path / "config.json").read_text()) == {**CONFIG, "optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}


def test_the_same_config_comes_back_and_may_change_where_the_result_does_not(tmp_path):
    claim(tmp_path, CONFIG)
    assert claim(tmp_path, CONFIG) == tmp_path
    other = changed(mesh={"data": 8, "fsdp": 2}, log_every=1, checkpoint={"every": 5}, distributed=True)
    claim(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"] == {"data": 8, "fsdp": 2}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(optim={"lr": 2e-3, "betas": (0.9, 0.99)}), r"optim\.lr is 0\.001 there and 0\.002 here"),
        (changed(seed=False), "seed is 0 there and false here"),
        (changed(steps=5), "steps is absent there and 5 here"),
        (changed(optim={"lr": 1e-3}), r"optim\.betas is \[0\.9, 0\.99\] there and absent here"),
        (changed(optim={}), r"optim is absent there and \{\} here"),
    ],
)
def test_another_config_is_refused_and_the_difference_named(tmp_path, other, said):
    claim(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"holds another config's run: {said}") as caught:
        claim(tmp_path, other)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_checkpoints_that_no_config_explains_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, CONFIG)  # an empty folder explains itself
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "5").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoints without a config\.json"):
        claim(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json (cannot be read|does not hold a config)"):
        claim(tmp_path, CONFIG)


def test_a_check_writes_nothing_and_a_lock_makes_the_folder(tmp_path):
    assert workdir.check_config(tmp_path / "a", CONFIG) is None
    assert not (tmp_path / "a").exists()
    with workdir.lock(tmp_path / "a"):
        claim(tmp_path / "a", CONFIG)
    with pytest.raises(UserError, match="another config's run"):
        workdir.check_config(tmp_path / "a", changed(seed=1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*f/run: Not a directory"), workdir.lock(tmp_path / "f" / "run"):
        pass


def test_a_file_is_not_a_workdir(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        claim(tmp_path / "f", CONFIG)


def test_a_url_of_another_kind_is_not_a_workdir_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="memory://b/x is a URL of memory: give a local path, or gs://BUCKET/FOLDER"):
        claim("memory://b/x", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_value_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.fn\[0\] is a function, which JSON cannot hold"):
        claim(tmp_path, {"data": {"fn": [lambda: 0]}})
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_writes_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
    claim(tmp_path, CONFIG)
    assert not list(tmp_path.iterdir())


def test_json_has_no_bare_nan_and_takes_numpy_and_jax_values(tmp_path):
    value = {
        "a": np.float32(0.5),
        "b": jnp.int32(3),
        "c": [np.nan, np.inf, -np.inf],
        "d": np.bool_(True),
        "e": tmp_path,
    }
    path = write_json(tmp_path / "s.json", value)
    found = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found == {"a": 0.5, "b": 3, "c": ["NaN", "Infinity", "-Infinity"], "d": True, "e": str(tmp_path)}
    assert [float(x) for x in found["c"][1:]] == [np.inf, -np.inf]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device"):
        write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_written_files_are_readable_by_others(tmp_path):
    path = write_text(tmp_path / "sub" / "a.txt", "x")
    assert Path(path).stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path / "sub") == ["a.txt"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    with workdir.lock(tmp_path), pytest.raises(InUse, match="in use by another run"), workdir.lock(tmp_path):
        pass
    with workdir.lock(tmp_path):
        pass
