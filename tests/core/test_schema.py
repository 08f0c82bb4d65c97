"""Laws of typed JSON: one line names file and key, unknown keys stay, and what is no file is refused at once."""

import json
import os

import pytest

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import AdapterConfig, ModelConfig, SafetensorsIndex


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_keys_that_no_type_declares_stay(tmp_path):
    value = {"hidden_size": 16, "rope_theta": 5, "auto_map": {"x": [1, None]}, "rope_scaling": {"mrope": [1]}}
    assert schema.decode(write(tmp_path / "config.json", value), ModelConfig) == value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (ModelConfig, {"hidden_size": "16"}, "hidden_size must be a whole number or null, not '16'"),
        (ModelConfig, {"hidden_size": True}, "hidden_size must be a whole number or null, not True"),
        (ModelConfig, {"hidden_size": -1}, "hidden_size must be a whole number >= 0, not -1"),
        (ModelConfig, {"rope_scaling": {"factor": [8]}}, r"rope_scaling.factor must be a number or null, not \[8\]"),
        (ModelConfig, {"rope_theta": 10**400}, "Number out of range - at rope_theta"),
        (AdapterConfig, {"rank_pattern": [1]}, r"rank_pattern must be an object or null, not \[1\]"),
        (SafetensorsIndex, {"weight_map": {"a": 3}}, r"weight_map\[\.\.\.\] must be text, not a whole number"),
        (SafetensorsIndex, {}, "weight_map is missing"),
        (dict, [1], "does not hold a JSON object"),
        (dict, '{"a": "\\ud800"}', "cannot be read as JSON: .*surrogates not allowed"),
        (dict, "[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_value_of_another_type_is_one_line_with_file_and_key(tmp_path, kind, value, message):
    with pytest.raises(UserError, match=rf"x\.json:? {message}") as error:
        schema.decode(write(tmp_path / "x.json", value), kind)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    reasons = {"pipe": "it is a named pipe", "folder": "it is a folder", "zero": "it is a device", "loop": "Too many"}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"{name}.json cannot be read: {reason}"):
            schema.decode(tmp_path / f"{name}.json")


def test_a_text_too_large_for_what_it_is_is_refused(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(schema.LARGEST + 1)
    with pytest.raises(UserError, match="and at most 67108864 are read"):
        schema.decode(tmp_path / "x.json")
