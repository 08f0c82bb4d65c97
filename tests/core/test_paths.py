"""Local paths and paths in a bucket are read and written in one way, and other URLs are refused."""

import importlib.util
import pathlib

import pytest

from lowrank.adapters.export import merge_to_hf
from lowrank.core import files, paths
from lowrank.core.errors import UserError
from lowrank.quantization import write_quantized


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    """An empty folder as a string."""
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_a_file_is_read_as_it_was_written_and_replaced_whole(folder):
    path = paths.as_path(folder) / "sub" / "a.json"
    assert not paths.exists(path)
    assert not paths.is_folder(path.parent)
    for value in ({"a": 1}, {"b": [2.5, "ü"]}):
        assert files.write_json(path, value) == path
        assert files.read_json(str(path)) == value
    assert paths.exists(path)
    assert not paths.is_folder(path)
    assert paths.is_folder(path.parent)
    with paths.local_file(path) as local:
        assert isinstance(local, pathlib.Path)
        assert local.read_bytes() == paths.read_bytes(path)
    assert paths.size(folder) == len(paths.read_bytes(path))
    assert paths.size(path) == len(paths.read_bytes(path))


def test_children_are_the_files_and_folders_by_name(folder):
    assert paths.children(f"{folder}/none") == []
    for name in ("b/x", "b/y", "a"):
        files.write_text(f"{folder}/{name}", name)
    assert paths.children(folder) == [paths.as_path(folder) / "a", paths.as_path(folder) / "b"]
    files.write_text(f"{folder}/c", "")  # a list is not remembered
    assert [path.name for path in paths.children(folder)] == ["a", "b", "c"]


def test_a_file_that_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError):
        paths.read_text(f"{folder}/a.json")
    with pytest.raises(UserError, match=r"a\.json cannot be read: .*No such"):
        files.read_json(f"{folder}/a.json")


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="cannot write gs://lowrank-tests-none/a: No such object or bucket"):
        files.write_text(f"{bucket}-none/a", "")
    assert not paths.exists(f"{bucket}-none/a")


@pytest.mark.parametrize("url", ["memory://b/x", "s3://b/x", "https://b/x", "gs://", "gs:///x", "gs:/b/x", "file:/x"])
def test_another_url_is_refused_and_makes_no_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{url} is a URL of .*: give a local path, or gs://BUCKET/FOLDER"):
        files.write_text(url, "")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_a_model_is_not_written_to_a_bucket(tmp_path):
    assert paths.as_local_path(str(tmp_path)) == tmp_path
    for write in (lambda url: merge_to_hf({}, None, url), lambda url: write_quantized("none", "nf4", url)):
        with pytest.raises(UserError, match="gs://b/model is in a bucket: give a local folder"):
            write("gs://b/model")


def test_without_gcsfs_a_bucket_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"gs://b/x needs the package gcsfs: install it with pip install 'lowrank\[gcs\]'"
    ):
        paths.as_path("gs://b/x")


def test_home_and_variables_are_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    assert paths.as_path("~/$RUNS/a") == paths.as_path("$HOME/${RUNS}/a") == tmp_path / "runs" / "a"
    assert paths.as_path("a$/b~") == pathlib.Path("a$/b~")


@pytest.mark.parametrize("path", ["$NOWHERE/run", "a/${NOWHERE}/run"])
def test_a_variable_that_is_not_set_is_no_name_of_a_folder(path):
    with pytest.raises(UserError, match=r"the environment variable \$.*NOWHERE.* is not set"):
        paths.as_path(path)


def test_a_user_that_is_not_there_is_no_name_of_a_folder():
    with pytest.raises(UserError, match="~nobody-at-all has no home folder"):
        paths.as_path("~nobody-at-all/run")
