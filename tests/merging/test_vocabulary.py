"""Vocabularies that are merged by token string."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowrank import pretrained
from lowrank.core.errors import UserError
from lowrank.merging.combine import plan
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.merged_models import edit_config, fine_tune, merged, recipe, tensors

EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with three padding rows, and a model that swaps two tokens, lacks one and has one of its own."""
    folder = tmp_path_factory.mktemp("vocabularies")
    base = tiny.llama(folder / "base")
    count = len(tiny.vocabulary())
    ids = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    found = {"base": base, "same": fine_tune(base, folder / "same", 1), "other": fine_tune(base, folder / "other", 2)}
    for path in (found["base"], found["same"]):
        _resize(path, lambda x: np.concatenate([x, np.ones((3, x.shape[1]), np.float32)]), count + 3)
    content = json.loads((base / "tokenizer.json").read_text())
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    ids["tree"] = ids.pop("red")
    content["model"]["vocab"] = ids
    (found["other"] / "tokenizer.json").write_text(json.dumps(content))
    return found


def _resize(path, change, rows):
    arrays = tensors(path)
    arrays |= {name: change(arrays[name]) for name in (EMBED, "lm_head.weight")}
    save_file(arrays, path / "model.safetensors", {"format": "pt"})
    edit_config(path, vocab_size=rows)


def vocabulary(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {t["content"]: t["id"] for t in content.get("added_tokens", [])}
    return content["model"]["vocab"] | added


MIX = {"merge_method": "linear", "parameters": {"weight": 1.0}}


def test_different_vocabularies_are_refused(models):
    with pytest.raises(UserError, match=r"the vocabularies of .*base and .*other differ, at first in '(cat|dog)': set"):
        plan(recipe(models, models=[{"model": "base"}, {"model": "other"}], **MIX))


@pytest.mark.parametrize("source", ["base", "union"])
def test_rows_are_matched_by_token(source, models, tmp_path):
    listed = [{"model": "base"}, {"model": "other"}]
    result = merged(models, tmp_path / "m", models=listed, tokenizer_source=source, **MIX)
    base, other, ids = (tensors(models["base"]), tensors(models["other"]), vocabulary(tmp_path / "m"))
    theirs, ours = vocabulary(models["other"]), vocabulary(models["base"])
    for name in (EMBED, "lm_head.weight"):
        for token in ("cat", "dog", "sat"):
            expected = (base[name][ours[token]] + other[name][theirs[token]]) / 2
            assert_close(result[name][ids[token]], expected)
        np.testing.assert_array_equal(result[name][ids["red"]], base[name][ours["red"]])
        if source == "union":
            np.testing.assert_array_equal(result[name][ids["tree"]], other[name][theirs["tree"]])
    rows = {"base": len(base[EMBED]), "union": len(ours) + 1}[source]
    assert len(result[EMBED]) == rows == json.loads((tmp_path / "m/config.json").read_text())["vocab_size"]
    loaded = pretrained.load(str(tmp_path / "m"))
    assert loaded.tokenizer.encode("cat dog") == [ids["cat"], ids["dog"]]


def test_padding_rows_are_kept_and_multiples_reached(models, tmp_path):
    listed = [{"model": "base"}, {"model": "same"}]
    result = merged(models, tmp_path / "m", models=listed, tokenizer={"source": "base", "pad_to_multiple_of": 8}, **MIX)
    base, count = tensors(models["base"]), len(tiny.vocabulary())
    assert len(result[EMBED]) == -(-(count + 3) // 8) * 8
    np.testing.assert_array_equal(result[EMBED][count : count + 3], base[EMBED][count:])
