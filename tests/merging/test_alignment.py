"""Models that are permuted copies of each other, or of another width, brought into one order before a merge."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowrank import pretrained
from lowrank.core.errors import UserError
from lowrank.merging import report
from lowrank.merging.adapter_merge import plan_adapters
from lowrank.merging.alignment import align, matching, transport
from lowrank.merging.alignment.barrier import line
from lowrank.merging.alignment.options import Options
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.combine import combine, plan
from lowrank.merging.model_spec import ModelSpec
from lowrank.models import build_model
from tests.support import permuted_models
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.merged_models import edit_config, fine_tune, recipe, tensors

TOKENS = np.array([[3, 8, 9, 7, 12, 6, 20]])
MAKERS = {"llama": tiny.llama, "bert": tiny.bert}
PERMUTED = {"llama": permuted_models.llama, "bert": permuted_models.bert}


def output(folder, method="features"):
    model = pretrained.load(str(folder))
    return np.asarray(build_model(model.config).apply({"params": model.params}, TOKENS, method=method))


def checkpoint(folder):
    return Checkpoint(ModelSpec(str(folder)))


def aligned(reference, model, **options):
    """`{name: tensor of model in the reference's order}`."""
    ours, theirs = checkpoint(reference), checkpoint(model)
    moves = align.find_moves(ours, theirs, Options(**options))
    return {name: moves.apply(name, theirs.read(name)) for name in theirs.tensors}


def test_the_worked_matching_of_a_layer():
    up = [np.array([[1.0, 0, 2], [0, 1, -1]]), np.array([[2.1, 0.9, 0.1], [-1.1, 0.1, 0.9]])]
    down = [np.array([[1.0, 1], [0, 2], [-1, 0]]), np.array([[-0.9, 0.1], [1.1, 0.9], [0.1, 2.1]])]
    layers = [{"read": u.T, "write": d} for u, d in zip(up, down, strict=True)]
    assert matching.match_units(*layers).tolist() == [1, 2, 0]
    assert matching.match_units(layers[0], layers[0]).tolist() == [0, 1, 2]
    assert matching.assign(np.zeros((3, 3))).tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", MAKERS)
def test_a_permuted_copy_is_recovered_exactly(family, tmp_path):
    source = MAKERS[family](tmp_path / "source")
    copy = PERMUTED[family](source, tmp_path / "copy")
    assert_close(output(copy), output(source), relative=2e-5, size=1)
    assert any(not np.array_equal(x, tensors(copy)[n]) for n, x in tensors(source).items())
    for name, x in aligned(source, copy).items():
        np.testing.assert_array_equal(x, tensors(source)[name], err_msg=name)


def test_the_order_of_the_residual_stream_is_recovered_when_asked_for(tmp_path):
    source = tiny.llama(tmp_path / "source")
    copy = permuted_models.llama(source, tmp_path / "copy", residual=True)
    assert_close(output(copy, "__call__"), output(source, "__call__"), relative=2e-5, size=1)
    found, asked = aligned(source, copy), aligned(source, copy, residual=True)
    for name, x in tensors(source).items():
        np.testing.assert_array_equal(asked[name], x, err_msg=name)
    assert not np.array_equal(found["model.embed_tokens.weight"], tensors(source)["model.embed_tokens.weight"])


def test_a_fine_tune_of_one_base_stays_as_it_is_and_a_permuted_one_comes_back(tmp_path):
    source = tiny.llama(tmp_path / "source")
    tuned = fine_tune(source, tmp_path / "tuned", 1, size=0.01)
    for name, x in aligned(source, tuned, residual=True).items():
        np.testing.assert_array_equal(x, tensors(tuned)[name], err_msg=name)
    copy = permuted_models.llama(tuned, tmp_path / "copy", seed=3)
    for name, x in aligned(source, copy).items():
        np.testing.assert_array_equal(x, tensors(tuned)[name], err_msg=name)


def loss_of_mlp(arrays, target):
    """The squared distance of an MLP's outputs from those of `target`."""

    def outputs(x):
        gate, up, down = (np.float64(x[f"model.layers.0.mlp.{n}_proj.weight"]) for n in ("gate", "up", "down"))
        inputs = np.random.default_rng(0).standard_normal((tiny.WIDTH, 20))
        hidden = gate @ inputs
        return down @ (hidden / (1 + np.exp(-hidden)) * (up @ inputs))

    return float(np.square(outputs(arrays) - outputs(target)).mean())


def test_the_barrier_of_a_permuted_copy_goes_to_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_plot", lambda *rest: None)  # of every merge on the lines
    source = tiny.llama(tmp_path / "source")
    copy, target = permuted_models.llama(source, tmp_path / "copy"), tensors(source)
    score = lambda params: -loss_of_mlp(params, target)  # noqa: E731
    before = line(target, tensors(copy), score, points=5)
    after = line(target, aligned(source, copy), score, points=5)
    assert before.places == (0, 0.25, 0.5, 0.75, 1)
    assert before.barrier > 0.01
    assert after.barrier < 1e-12
    models = {"source": source, "copy": copy}
    given = {"merge_method": "uniform_soup", "models": [{"model": n} for n in models], "align": {}}
    summary = combine(recipe(models, **given), tmp_path / "m", score=lambda folder: score(tensors(folder)))
    found = summary["barriers"][str(copy)]
    assert_close(np.array(found["before"]), np.array(before.scores), relative=1e-5)
    assert found["barrier_before"] > 0.01
    assert found["barrier_after"] < 1e-12
    with pytest.raises(UserError, match="a line of 2 points has no middle"):
        line({}, {}, score, points=2)
    with pytest.raises(UserError, match=r"the ends of a line differ in the tensor 'lm_head.weight'"):
        line(tensors(source), {k: v for k, v in tensors(source).items() if "lm_head" not in k}, score)


@pytest.mark.parametrize("method", ["matching", "transport"])
def test_a_recipe_aligns_before_it_merges(method, tmp_path):
    source = tiny.llama(tmp_path / "source")
    models = {"source": source, "copy": permuted_models.llama(source, tmp_path / "copy")}
    given = {"merge_method": "uniform_soup", "models": [{"model": n} for n in models], "align": {"method": method}}
    summary = combine(recipe(models, **given), tmp_path / "m")
    for name, x in tensors(source).items():
        assert_close(tensors(tmp_path / "m")[name], x)
    assert 0.5 < summary["moved_by_alignment"][str(models["copy"])] < 1
    assert json.loads((tmp_path / "m/merge_report.json").read_text())["moved_by_alignment"]


def test_the_worked_transport():
    x, y = np.array([[0.0, 0], [1, 1]]), np.array([[0.0, 0], [1, 0], [1, 1]])
    cost = np.square(x[:, None] - y).sum(-1)
    plan_ = transport.transport_plan(cost)
    assert_close(plan_, np.array([[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]]), relative=1e-9, size=1)
    assert_close((plan_ * cost).sum(), 1 / 3, relative=1e-9)
    soft = transport.transport_plan(cost, 0.02)
    assert_close(soft, plan_, relative=1e-6, size=1)
    softer = transport.transport_plan(cost, 1.0)
    assert_close(softer.sum(1), np.full(2, 1 / 2), relative=1e-9)
    assert_close(softer.sum(0), np.full(3, 1 / 3), relative=1e-6)
    with pytest.raises(UserError, match="an exact transport of 1000 to 999 units is too large"):
        transport.transport_plan(np.zeros((999, 1000)))


def test_a_transport_splits_units_of_a_narrower_model_without_changing_its_function(tmp_path):
    narrow = tiny.llama(tmp_path / "narrow")
    wide = fine_tune(narrow, tmp_path / "wide", 0, size=0)
    arrays = tensors(narrow)
    for i in range(tiny.LAYERS):  # every unit twice, each of which writes half
        mlp = f"model.layers.{i}.mlp"
        for name in ("gate", "up"):
            arrays[f"{mlp}.{name}_proj.weight"] = np.repeat(arrays[f"{mlp}.{name}_proj.weight"], 2, axis=0)
        arrays[f"{mlp}.down_proj.weight"] = np.repeat(arrays[f"{mlp}.down_proj.weight"] / 2, 2, axis=1)
    save_file(arrays, wide / "model.safetensors", {"format": "pt"})
    edit_config(wide, intermediate_size=2 * tiny.HIDDEN)
    models = {"wide": wide, "narrow": narrow}
    given = {"merge_method": "uniform_soup", "models": [{"model": n} for n in models]}
    combine(recipe(models, align={"method": "transport"}, **given), tmp_path / "m")
    for name, x in tensors(wide).items():
        assert_close(tensors(tmp_path / "m")[name], x)
    with pytest.raises(UserError, match=r"units=64 and .* units=32, which .*: align by method: transport"):
        plan(recipe(models, align={}, **given))


BAD = {
    "a method": ({"method": "matchng"}, r"unknown align.method.*did you mean 'matching'"),
    "a key": ({"mehtod": "matching"}, r"align: the key 'mehtod' is not supported \(did you mean 'method'"),
    "a negative regularization": ({"method": "transport", "regularization": -1.0}, "regularization=-1.0 is negative"),
    "regularized matching": ({"regularization": 0.1}, "regularization is for method: transport"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    keys, message = BAD[case]
    with pytest.raises(UserError, match=message):
        recipe({}, merge_method="uniform_soup", models=[{"model": "a"}], align=keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"merge_method": "fisher", "models": [{"model": "a"}]},
            "statistics of fisher are of the order before",
        ),
        (
            {
                "merge_method": "linear",
                "models": [{"model": "a"}],
                "tokenizer_source": "union",
                "align": {"residual": True},
            },
            "align.residual moves what tokenizer_source reads",
        ),
        (
            {
                "merge_method": "linear",
                "slices": [{"sources": [{"model": n, "layer_range": [i, i + 1]} for i, n in enumerate("ab")]}],
            },
            "align matches layers of one number",
        ),
    ],
)
def test_what_does_not_move_with_the_tensors(keys, message):
    with pytest.raises(UserError, match=message):
        recipe({}, **{"align": {}} | keys)


def test_models_that_have_no_alignment(tmp_path):
    source = tiny.llama(tmp_path / "source")
    other = fine_tune(source, tmp_path / "other", 1)
    edit_config(other, num_key_value_heads=4)
    models = {"source": source, "other": other}
    given = {"merge_method": "uniform_soup", "models": [{"model": n} for n in models], "align": {}}
    with pytest.raises(UserError, match=r"has groups=2 and .* groups=4, which cannot be aligned"):
        plan(recipe(models, **given))
    with pytest.raises(UserError, match="align moves the tensors of whole models"):
        plan_adapters(recipe(models, **given, adapter={}))
