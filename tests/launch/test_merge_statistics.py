"""Statistics that a recipe asks for: computed once from the data that it names, then merged with."""

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from launch import combine, merge_statistics
from lowrank.core.errors import UserError
from lowrank.merging.combine import combine as combine_models
from lowrank.merging.recipe import parse_recipe
from tests.support import tiny_checkpoint
from tests.support.close import assert_close
from tests.support.merged_models import family, tensors

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two fine-tunes and records. Not to be changed."""
    where = tmp_path_factory.mktemp("models")
    family(where, 2)
    tiny_checkpoint.records(where / "records.jsonl", 6)
    return where


def text(folder, method="regmean", **changes):
    request = {"data": f"jsonl:{folder / 'records.jsonl'}", "rows": 4, "seq_len": 32, **changes}
    listed = [{"model": str(folder / name), "statistics": request} for name in "ab"]
    return yaml.safe_dump({"merge_method": method, "models": listed, "parameters": {"alpha": 1.0}})


def test_the_command_computes_what_is_missing_and_merges_with_it(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(text(folder))
    arguments = [f"--recipe={tmp_path / 'recipe.yaml'}", f"--output={tmp_path / 'merged'}"]
    combine.main([*arguments, "--dry_run"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]
    combine.main(arguments)
    assert "merged into" in capsys.readouterr().out
    made = merge_statistics.with_files(parse_recipe(text(folder)), tmp_path / "other")
    grams = [np.float64(load_file(source.statistics)[Q]) for source in made.slices[0].sources]
    assert not np.array_equal(*grams)
    kernels = [np.float64(tensors(folder / name)[Q]) for name in "ab"]
    expected = np.linalg.solve(sum(grams), sum(g @ k.T for g, k in zip(grams, kernels, strict=True))).T
    assert_close(tensors(tmp_path / "merged")[Q], expected, relative=1e-4)
    monkeypatch.setattr(merge_statistics, "compute", lambda *rest: pytest.fail("computed again"))
    merge_statistics.with_files(parse_recipe(text(folder)), tmp_path / "third")
    with pytest.raises(pytest.fail.Exception):
        merge_statistics.with_files(parse_recipe(text(folder, rows=3)), tmp_path / "third")


BAD = {
    "no file": ({"data": "jsonl:missing.jsonl"}, "missing.jsonl"),
    "labels": ({"labels": "modle"}, r"unknown labels of statistics.*'modle' \(did you mean 'model'\?\)"),
    "rows": ({"rows": 0}, "rows=0 of statistics is below 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_a_model_is_read(case, folder, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message):
        merge_statistics.check(parse_recipe(text(folder, **changes)))


def test_a_request_needs_data_and_the_command(folder, tmp_path):
    with pytest.raises(UserError, match="the key 'row' is not supported"):
        parse_recipe(text(folder, row=3))
    with pytest.raises(UserError, match="have no data"):
        parse_recipe(text(folder, data=""))
    with pytest.raises(UserError, match=r"the statistics of .* are not computed: launch.combine does"):
        combine_models(parse_recipe(text(folder)), tmp_path / "m")
