"""Any method on any quantized base, by rule order: training runs, what they leave, and merges into codes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.evaluate import evaluate
from lowrank import pretrained
from lowrank.adapters import export, load
from lowrank.core.errors import UserError
from lowrank.core.weight import is_stored, materialize
from lowrank.models import build_model
from lowrank.training import loop
from lowrank.training.log import read_metrics
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.thinning import leave
from tests.support.tiny_models import run
from tests.support.tiny_runs import config_of

values = jax.jit(materialize)
NF4 = {"name": "nf4", "block": 8, "double": True}
RUNS = {
    "qlora": ("rank=2", "llama", NF4),
    "qdora": ("method=dora,rank=2", "llama", "nf4"),
    "ia3 on asymmetric int4": ("method=ia3", "llama", {"name": "int4", "block": 8, "symmetric": False}),
    "bitfit on int8": ("method=bitfit", "llama", {"name": "int8", "target": ".*kernel"}),
}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """`run(name) -> (config, folder, summary, frozen before, frozen after)`, each run once."""
    done = {}

    def run(name):
        if name not in done:
            arg, model, quantize = RUNS[name]
            config = config_of(files, arg, model, model__quantize=quantize, optim__lr=0.05, mesh__data=1)
            config.checkpoint.every, config.eval = 0, {"split": "train" if name == "qlora" else ""}
            seen, train, folder = [], loop.Trainer.train, tmp_path_factory.mktemp("run")

            def watched(run, *args):
                before = jax.device_get(run.frozen)
                summary = train(run, *args)
                seen.extend([before, jax.device_get(run.frozen)])
                return summary

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop.Trainer, "train", watched)
                done[name] = (config, folder, loop.run(config, folder), *seen)
        return done[name]

    return run


@pytest.mark.parametrize("name", leave(RUNS, ("qdora",)))
def test_the_loss_falls_and_the_codes_stay(name, runs):
    config, folder, summary, before, after = runs(name)
    losses = [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == config.steps
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.02
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert sum(x.dtype in (np.uint8, np.int8) for x in jax.tree.leaves(before)) >= 7
    assert summary["total_bytes"] < 4 * summary["total_params"]


def test_the_adapter_comes_back_on_the_base_in_codes(runs):
    config, folder, summary, *_ = runs("qlora")
    assert_close(evaluate(config, folder)["perplexity"], summary["after"]["perplexity"])


def test_leaves_by_name_come_back_on_the_base_in_codes(runs):
    config, folder, _, before, _ = runs("bitfit on int8")
    loaded = load.load_adapted(folder / "adapter", config.model.name).params
    assert is_stored(loaded["head"]["kernel"])
    np.testing.assert_array_equal(loaded["head"]["kernel"].codes, before["head"]["kernel"].codes)


def test_the_adapter_of_qlora_is_one_of_peft(runs):
    folder = runs("qlora")[1] / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((folder / "quantized_base.json").read_text()) == {**NF4, "param_dtype": "float32"}


@pytest.mark.parametrize("codes", export.CODES)
def test_a_merge_into_codes_says_what_it_costs(codes, runs, tmp_path):
    config, folder, *_ = runs("qlora")
    model = load.load_adapted(folder / "adapter", config.model.name)
    report = export.merge_to_hf(model.params, model, tmp_path / "merged", codes=codes)
    again = pretrained.load(str(tmp_path / "merged"))
    w, kernel = (p["layers"]["attn"]["q"]["kernel"] for p in (model.params, again.params))
    exact = np.float64(values(w.base)) + np.einsum("lir,lro->lio", w.a, w.b) * np.asarray(w.scale)[:, None, None]
    others = ("attn/k", "attn/o", "mlp/up")
    for name in others:  # what no adapter is on is the values of its codes
        part, at = name.split("/")
        assert_close(again.params["layers"][part][at]["kernel"], values(model.params["layers"][part][at]["kernel"]))
    assert report.matrices == 2 * tiny.LAYERS
    if codes == "dequantize":
        assert_close(kernel, exact)
        assert report.error < 1e-5
        tokens = np.arange(5, 17, dtype=np.int32)[None]
        live, merged = (run(build_model(m.config), m.params, tokens, method="__call__") for m in (model, again))
        assert_close(live, merged)
    else:
        made = pretrained.load(str(tmp_path / "merged"), quantized=NF4).params["layers"]["attn"]["q"]["kernel"]
        assert_close(values(made), kernel, relative=0.02)  # codes of these values again
        names = [("attn", n) for n in "qv"]
        lost = [np.float64(again.params["layers"][p][n]["kernel"]) for p, n in names]
        whole = [model.params["layers"][p][n]["kernel"] for p, n in names]
        errors = sum(np.sum((k - np.float64(values(w))) ** 2) for k, w in zip(lost, whole, strict=True))
        delta = jax.jit(lambda w: w.delta())
        changes = sum(np.sum(np.float64(delta(w)) ** 2) for w in whole)
        assert_close(report.error, (errors / changes) ** 0.5)


def test_a_plain_base_cannot_be_requantized(files, tmp_path):
    base = pretrained.load(str(files / "llama"))
    with pytest.raises(UserError, match=r"was read without model\.quantize"):
        export.merge_to_hf(base.params, base, tmp_path / "out", codes="requantize")
    with pytest.raises(
        UserError, match=r"unknown merge into a quantized base 'requantise' \(did you mean 'requantize'"
    ):
        export.merge_to_hf(base.params, base, tmp_path / "out", codes="requantise")


def test_full_fine_tuning_cannot_train_codes(files, tmp_path):
    with pytest.raises(UserError, match="only floating-point leaves can be trained"):
        loop.run(config_of(files, "method=full", model__quantize="nf4"), tmp_path)


def test_a_bfloat16_base_in_codes_is_trained_on_a_mesh(files, tmp_path):
    config = config_of(files, "rank=2", model__quantize=NF4, model__param_dtype="bfloat16", steps=2)
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert jnp.isfinite(loop.run(config, tmp_path)["final_loss"])
