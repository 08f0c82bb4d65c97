"""Recipes that are refused as they are read."""

import pytest

from lowrank.core.errors import UserError
from lowrank.merging.output import check_new
from lowrank.merging.parameters import evaluate
from lowrank.merging.recipe import read_recipe

VALID = "merge_method: linear\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "cannot be read: 'utf-8'"),
        (b"models: &a [*a]", "is not YAML"),
        (f"{VALID}seed: 1\nseed: 2".encode(), r"recipe\.yaml:4: the key 'seed' is there twice, first on line 3"),
        (b"models: [{model: a, model: b}]", r"recipe\.yaml:1: the key 'model' is there twice, first on line 1"),
        (f"{VALID}chat_template: chatml".encode(), "chat_template='chatml' is not a Jinja template"),
        (f"{VALID}seed: -1".encode(), "seed=-1 is below 0"),
        (f"{VALID}tokenizer: {{source: base, pad_to_multiple_of: 0}}".encode(), "pad_to_multiple_of=0 is below 1"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_recipe(path)


def test_an_output_below_a_file_or_in_a_full_folder(tmp_path):
    assert check_new(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        check_new(tmp_path / "file" / "merged")
    with pytest.raises(UserError, match="is not an empty directory"):
        check_new(tmp_path)


def test_a_filter_is_text():
    assert evaluate([{"filter": "mlp", "value": 1}, {"value": 2}], "mlp.up", 0.0) == 1
    with pytest.raises(UserError, match="the filter 3 is not text"):
        evaluate([{"filter": 3, "value": 1}], "mlp.up", 0.0)
