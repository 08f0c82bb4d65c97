"""Laws of JSON that is read: what Python's reader gives up on is an error of one line, and no other exception."""

import json

import pytest

from lowrank.adapters import adapter_files, peft
from lowrank.core import files
from lowrank.core.errors import UserError
from lowrank.data.sources import open_source
from lowrank.pretrained import hf_files

DEEP = "[" * 200_000 + "]" * 200_000
BAD = {"deep": f'{{"a": {DEEP}}}', "long": f'{{"a": {"9" * 5000}}}', "cut": '{"a": 1', "other": "{'a': 1}"}


@pytest.mark.parametrize("text", [DEEP, *BAD.values()], ids=lambda text: text[:6])
def test_what_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested too deeply|5000 digits|delimiter|double quotes"):
        files.parse_json(text)


@pytest.mark.parametrize("name", BAD)
def test_every_reader_names_the_file(tmp_path, name):
    readers = {
        "config.json": lambda: hf_files.read_json(tmp_path / "config.json"),
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
