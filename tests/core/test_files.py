"""Laws of JSON that is read: what Python's reader gives up on is an error of one line, and no other exception."""

import json
import os
import pathlib

import numpy as np
import pytest

from lowrank.adapters import adapter_files, peft
from lowrank.core import files, schema
from lowrank.core.errors import InUse, UserError
from lowrank.data.sources import open_source
from lowrank.merging import statistics
from lowrank.quantization import write_quantized
from tests.support import checkpoint_files

DEEP = "[" * 200_000 + "]" * 200_000
BAD = {"deep": f'{{"a": {DEEP}}}', "long": f'{{"a": {"9" * 5000}}}', "cut": '{"a": 1', "other": "{'a': 1}"}


@pytest.mark.parametrize("text", [DEEP, *BAD.values()], ids=lambda text: text[:6])
def test_what_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested too deeply|5000 digits|delimiter|double quotes"):
        files.parse_json(text)


@pytest.mark.parametrize("name", BAD)
def test_every_reader_names_the_file(tmp_path, name):
    readers = {
        "config.json": lambda: schema.decode(tmp_path / "config.json"),
        "summary.json": lambda: files.read_json(tmp_path / "summary.json"),
        "adapter_config.json": lambda: peft.describe_adapter(tmp_path),
        "quantized_base.json": lambda: adapter_files.base_of(tmp_path),
    }
    for file, read in readers.items():
        (tmp_path / file).write_text(BAD[name])
        with pytest.raises(UserError, match=file):
            read()


@pytest.mark.parametrize("name", BAD)
def test_a_record_is_named_by_its_line(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': 'a'})}\n{BAD[name]}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line"):
        open_source(f"jsonl:{tmp_path}/a.jsonl", "train", tmp_path)


def test_what_a_kill_left_beside_a_file_is_removed_by_the_next_run(tmp_path):
    (tmp_path / ".a.json.0123456789ab").write_text("half")  # the lock ended with its process
    (tmp_path / ".a.json.abcdefabcdef").mkdir()
    (tmp_path / ".b.json.0123456789ab").touch()  # of another file
    files.write_json(tmp_path / "a.json", {"x": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.0123456789ab", "a.json"]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with files.scratch_beside(tmp_path / "a", folder=True) as folder:
        files._leftovers.cache_clear()
        with files.scratch_beside(tmp_path / "a") as file:
            assert folder.is_dir()
            assert file.read_bytes() == b""
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_both_sizes(tmp_path):
    with pytest.raises(UserError, match=rf"x will take {2**62} bytes, and its disk has \d+ left"):
        files.require_space(tmp_path / "not" / "yet" / "x", 2**62)
    files.require_space(tmp_path, 1)


def test_what_is_held_is_refused_to_another_and_free_after_a_kill(tmp_path):
    (tmp_path / ".out.lock").touch()  # of a process that was killed
    with files.held(tmp_path / "out") as path:
        assert path == tmp_path / "out"
        with pytest.raises(InUse, match="out is written by another process"), files.held(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())
    with files.held(tmp_path / "new" / "out"):
        assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("name", ["text", "statistics", "quantized base"])
def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch, name):
    synced, renamed = set(), []
    sync, rename = os.fsync, {name: getattr(pathlib.Path, name) for name in ("rename", "replace")}
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), sync(handle)))

    def checked(how):
        def move(path, target):
            assert {p.stat().st_ino for p in [path, *path.rglob("*")]} <= synced
            renamed.append(target)
            return rename[how](path, target)

        return move

    for how in rename:
        monkeypatch.setattr(pathlib.Path, how, checked(how))
    if name == "text":
        files.write_text(tmp_path / "x", "text")
    elif name == "statistics":
        statistics.write(tmp_path / "x", {"w": np.ones((2, 2), np.float32)})
    else:
        base = checkpoint_files.directory(
            tmp_path / "base", {**checkpoint_files.LLAMA, "hidden_size": 64, "head_dim": 16}
        )
        write_quantized(str(base), {"name": "int8"}, tmp_path / "x")
    assert tmp_path / "x" in renamed
