import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight, materialize
from lowrank.evaluation import held_out
from lowrank.training import build, loop
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.log import read_metrics
from lowrank.training.workdir import check_config
from lowrank.weights.mixture import Gated, Routed
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.thinning import keep
from tests.support.tiny_runs import config_of

LM_METHODS = {
    "full": "method=full",
    "partial": "method=partial,layers=1",
    "head": "method=head",
    "norm": "method=norm",
    "chosen": "method=chosen,leaves=.*mlp/down/kernel",
    "first layers": "method=partial,layers=1,first=True",
    "sparse": "method=sparse,density=0.1,choose=movement,batches=2",
    "tokens": "method=tokens,tokens=the",
    "bitfit": "method=bitfit",
    "lora": "method=lora,rank=2,dropout=0.1",
    "dora": "method=dora,rank=2",
    "lora_fa": "method=lora_fa,rank=2",
    "lora_xs": "method=lora_xs,rank=4",
    "edora": "method=edora,rank=4",
    "bidora": "method=bidora,rank=2,retrain=0.0",
    "longlora": "method=longlora,group=4,rank=2,factor=2.0",
    "galore": "method=galore,rank=2,every=3",
    "relora": "method=relora,rank=2,every=4",
    "adalora": "method=adalora,init_rank=4,target_rank=2,orthogonal=0.001",
    "ia3": "method=ia3",
    "loha": "method=loha,rank=2",
    "prompt": "method=prompt,length=4,init=vocabulary",
    "ptuning": "method=ptuning,length=4,encoder=lstm,hidden=8",
    "prefix": "method=prefix,length=4",
    "mam": "method=mam,length=4,width=4,reparam=True,hidden=16",
    "lokr": "method=lokr,rank=1",
    "hira": "method=hira,rank=4",
    "vera": "method=vera,rank=32",
    "loftq": "method=loftq,rank=2,target=.*attn/(q|v)/kernel",
    "qa_lora": "method=qa_lora,rank=2,block=4,bits=2",
    "ir_qlora": "method=ir_qlora,rank=2,calibrate=10,target=.*attn/(q|v)/kernel",
    "modulora": "method=modulora,rank=2",
    "qat": "method=qat,quantize=ternary,activations=8",
    "oft": "method=oft,block=8",
    "boft": "method=boft,block=4",
    "houlsby": "method=houlsby,width=4",
    "scaled_parallel": "method=scaled_parallel,width=4",
    "more": "method=more,rank=2,experts=3",
    "smore": "method=smore,gate=4",
    "milora": "method=milora,rank=2",
    "intrinsic": "method=intrinsic,dim=64,said=True,target=.*attn/(q|v)/kernel",
}

# One method of each mechanism; ten steps of every method are in the golden run as well.
MECHANISMS = (
    *("full", "sparse", "lora", "bidora", "longlora", "galore", "relora", "adalora", "mam", "vera", "qa_lora", "more"),
)


def _losses(workdir):
    return [line["train/loss"] for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]


@pytest.fixture
def watched(monkeypatch):
    """Every run, with its frozen leaves before and after it."""
    seen, train = [], loop.Trainer.train

    def watch(run, *args):
        before = jax.device_get(run.frozen)
        summary = train(run, *args)
        seen.append((run, before, jax.device_get(run.frozen)))
        return summary

    monkeypatch.setattr(loop.Trainer, "train", watch)
    return seen


STARTS_ELSEWHERE = (
    *("prompt", "ptuning", "prefix", "mam", "longlora"),  # what they add is random, or attention is another one
    *("loftq", "qa_lora", "ir_qlora", "modulora", "qat"),  # the base is in codes
    "bidora",  # some records are held out
)


@pytest.fixture(scope="module")
def start(files):
    """The loss of the base on the first batch."""
    run = build.build_run(config_of(files, mesh__data=1))
    batch = sharding.make_global_batch(next(run.loader), run.mesh)
    sums = jax.jit(functools.partial(run.loss, rng=None))(run.load().params, batch)
    return float(sums.total / sums.weight)


@pytest.mark.parametrize("name", keep(LM_METHODS, MECHANISMS))
def test_every_method_keeps_the_contract_on_a_mesh(name, files, start, tmp_path, watched):
    """It starts as the base, lowers the loss, leaves frozen bytes alone, and its adapter is what was trained."""
    config = config_of(files, LM_METHODS[name], optim__lr=0.05, checkpoint__every=0)
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    summary = loop.run(config, tmp_path)
    found = _losses(tmp_path)
    assert len(found) == config.steps
    assert np.mean(found[-2:]) < np.mean(found[:2]) - 0.02
    if name not in STARTS_ELSEWHERE:
        assert_close(found[0], start, relative=2e-5)
    [(run, before, after)] = watched
    pairs = zip(tree.named_leaves(before), tree.named_leaves(after), strict=True)
    changed = {leaf for (leaf, x), (_, y) in pairs if not np.array_equal(x, y)}
    assert changed == (run.run.changing if run.run.method.hooks.every_n_steps else set())
    assert 0 < summary["trained_params"] <= summary["total_params"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    params, _ = methods.exported_leaves(run.run.method, run._params(), run.run.mask)
    params = run.run.method.bind(params, None, None) if run.run.method.bind else params
    again = load.load_adapted(tmp_path / "adapter", str(files / "llama")).params
    for (leaf, x), (_, y) in zip(_merged(params), _merged(again), strict=True):
        assert_close(y, x, name=leaf)


def _merged(params):
    """The leaves by name, with one for each form but those that route their input."""
    return tree.named_leaves(_materialized(jax.device_get(params)))  # on one device, in one program


@jax.jit
def _materialized(params):
    merge = lambda w: w if isinstance(w, Routed | Gated) else materialize(w)  # noqa: E731
    return jax.tree.map(merge, params, is_leaf=is_weight)


def test_a_classifier_learns_and_scores_itself(files, tmp_path, watched):
    config = config_of(files, "rank=2,target=.*attn/(q|v)/kernel", "bert", objective="classification")
    config.update(
        {"steps": 40, "eval": {"split": "train", "every": 20}, "checkpoint": {"every": 0}, "mesh": {"data": 1}}
    )
    config.optim.lr, config.model.pooling = 0.05, "mean"
    summary = loop.run(config, tmp_path)
    assert summary["before"]["accuracy"] < 0.8
    assert summary["after"]["accuracy"] > 0.95
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval/accuracy" in line] == [0, 20, 40]
    assert jax.tree.all(jax.tree.map(np.array_equal, *watched[0][1:]))


def test_scores_before_the_first_step_can_be_left_out(files, tmp_path):
    config = config_of(files, "method=head", steps=3, mesh__data=1)
    config.eval.update({"split": "train", "texts": 1, "max_new": 2, "before": False})
    summary = loop.run(config, tmp_path)
    assert summary["before"] == {}
    assert summary["samples"] == []
    assert summary["after"]["perplexity"] > 1
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl") if "eval/perplexity" in x] == [3]


def test_a_run_leaves_its_adapter_report_and_scores(files, tmp_path):
    config = config_of(files, "method=head", optim__lr=0.05, steps=4, mesh__data=1)
    config.eval.update({"split": "train", "texts": 3, "max_new": 4, "samples": 2})
    summary = loop.run(config, tmp_path, command="python -m launch.main --config=x")
    assert summary["after"]["perplexity"] < summary["before"]["perplexity"]
    assert {"rougeL", "bleu", "exact_match"} <= set(summary["after"])
    assert len(summary["samples"]) == 2
    report = (tmp_path / "report.md").read_text()
    assert "python -m launch.main --config=x" in report
    assert (tmp_path / "loss.png").stat().st_size > 1000
    base = pretrained.load(str(files / "llama"))
    loaded = adapter_files.load_leaves(tmp_path / "adapter", base.params, base.name)
    trained = load_file(tmp_path / "adapter" / "trained.safetensors")
    assert set(trained) == {"head/kernel"}
    np.testing.assert_array_equal(loaded["head"]["kernel"], trained["head/kernel"])
    assert not np.array_equal(loaded["head"]["kernel"], base.params["head"]["kernel"])
    with pytest.raises(UserError, match="not on 'another'"):
        adapter_files.load_leaves(tmp_path / "adapter", base.params, "another")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """`(config, workdir, summary)` of a short run."""
    config, workdir = config_of(files, "rank=2", steps=2, mesh__data=1), tmp_path_factory.mktemp("finished")
    return config, workdir, loop.run(config, workdir)


def test_lora_leaves_an_adapter_in_the_peft_format(finished):
    described = json.loads((finished[1] / "adapter" / "adapter_config.json").read_text())
    assert (described["peft_type"], described["r"]) == ("LORA", 2)
    assert len(load_file(finished[1] / "adapter" / "adapter_model.safetensors")) == 2 * 2 * tiny.LAYERS


def test_a_finished_run_returns_its_summary_again_and_says_so(finished, monkeypatch, capsys):
    config, workdir, summary = finished
    monkeypatch.setattr(loop, "Trainer", None)
    assert loop.run(config, workdir) == summary
    assert f"finished already; report: {workdir / 'report.md'}" in capsys.readouterr().err


def test_a_run_killed_before_its_summary_still_knows_its_loss(finished, tmp_path, capsys):
    config, workdir, summary = finished
    again = shutil.copytree(workdir, tmp_path / "again")
    (again / loop.SUMMARY).unlink()
    assert loop.run(config, again)["final_loss"] == summary["final_loss"] > 0
    log = capsys.readouterr().err
    assert "kernels on cpu: all in plain JAX" in log
    assert "attention on cpu: dense in " in log


def test_a_workdir_of_another_config_is_refused(finished, files):
    with pytest.raises(UserError, match=r"another config's run: optim.lr"):
        loop.run(config_of(files, "rank=2", steps=2, mesh__data=1, optim__lr=0.5), finished[1])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(files, tmp_path, monkeypatch):
    weights = iter([1.0] * 4 + [np.nan] * 10)
    batches = sharding.make_global_batch

    def poisoned(batch, *args):
        return batches({**batch, "weights": batch["weights"] * np.float32(next(weights))}, *args)

    monkeypatch.setattr(sharding, "make_global_batch", poisoned)
    with pytest.raises(UserError, match=r"loss is nan at step 5; the checkpoint of step 4 is intact"):
        loop.run(config_of(files, "rank=2", mesh__data=1), tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.latest() == 4
    assert np.isfinite(_losses(tmp_path)[:4]).all()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"method__name": "lorra"}, "unknown method 'lorra' (did you mean 'lora'?)"),
        ({"method__rnk": 3}, "method.rnk"),
        ({"method__target": "layers/q"}, "'layers/q' matches no"),
        ({"method__rank": 17}, "rank 17"),
        ({"model__name": "smollm3"}, "smollm"),
        ({"model__dtpe": "float32"}, "model.dtpe"),
        ({"data__sorce": "x"}, "data.sorce"),
        ({"data__batch_size": 12}, "batch_size 12 is not divisible by 8"),
        ({"data__seq_len": 65}, "64 positions"),
        ({"optim__name": "adamx"}, "'adamx'"),
        ({"optim__accumulate": 3}, "not divisible"),
        ({"optim__lr": float("nan")}, "optim.lr must be a finite number of at least 0, not nan"),
        ({"optim__no_decay": "["}, "'[' is not a regular expression"),
        ({"objective": "causal"}, "'causal'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": 2**63}, "seed must be below"),
        ({"mesh__data": 16}, "data=16"),
        ({"checkpoint__evry": 3}, "checkpoint.evry"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be >= 1"),
        ({"eval__split": "train", "eval__texts": 1, "eval__max_new": 99}, "eval.max_new=99"),
        ({"eval__split": "train", "eval__evry": 1}, "eval.evry"),
        ({"eval__texts": 1}, "eval.split is not set"),
        ({"method__also_train": 3}, "method.also_train must be a str or a Sequence[str], not 3"),
        ({"lg_every": 1}, "'config.lg_every' (did you mean 'config.log_every'?)"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(changes, culprit, files, tmp_path):
    config = config_of(files, "rank=2", **changes)
    with pytest.raises(UserError) as error:
        loop.run(config, tmp_path / "w")
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


def test_an_encoder_cannot_be_a_language_model(files, tmp_path):
    with pytest.raises(UserError, match="objective=classification"):
        loop.run(config_of(files, model="bert"), tmp_path)


def test_a_random_leaf_that_nothing_trains_is_refused(files, tmp_path):
    config = config_of(files, "rank=2,target=.*attn/(q|v)/kernel", "bert", objective="classification")
    with pytest.raises(UserError, match="checkpoint lacks pooler/bias, and the method does not train it"):
        loop.run(config, tmp_path)


def test_the_data_may_not_end_before_the_run(files, tmp_path):
    config = config_of(files, steps=50, data__epochs=1, data__packing=False, mesh__data=1, checkpoint__every=0)
    with pytest.raises(UserError, match="the data ended after step 5 of 50"):
        loop.run(config, tmp_path)


def test_what_a_rewrite_leaves_alone_is_not_copied(files):
    run = build.build_run(config_of(files, "rank=2", mesh__data=1))
    base = run.load()
    adapted, original = run.attach(base.params)
    before = {name: leaf.unsafe_buffer_pointer() for name, leaf in tree.named_leaves(base.params)}
    after = {name: leaf.unsafe_buffer_pointer() for name, leaf in tree.named_leaves(adapted)}
    assert original is None
    assert after["layers/attn/q/kernel/base"] == before["layers/attn/q/kernel"]
    assert after["embed/embedding"] == before["embed/embedding"]


def test_pissa_keeps_the_original_for_its_adapter(files):
    run = build.build_run(config_of(files, "rank=2,init=pissa", mesh__data=1))
    base = run.load()
    _, original = run.attach(base.params)
    assert original is base.params


def test_what_is_trained_is_float32_on_a_bfloat16_base(files):
    run = build.build_run(config_of(files, "method=bitfit", model__param_dtype="bfloat16", mesh__data=1))
    adapted, _ = run.attach(run.load().params)
    trained, frozen = tree.split(adapted, run.mask)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}


def test_a_corrupt_checkpoint_file_is_named(files, tmp_path):
    shutil.copytree(files / "llama", tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    shutil.copy(files / "records.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"tensor 'lm_head\.weight' is missing"):
        loop.run(config_of(tmp_path), tmp_path / "w")
    check_config(tmp_path / "w", config_of(files))  # a run that could not start keeps no other from the folder


def test_scores_hold_as_many_logits_a_device_as_a_step(files, monkeypatch):
    seen = []
    monkeypatch.setattr(held_out, "evaluate", lambda *_, chunk_tokens, **__: seen.append(chunk_tokens) or {})
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    build.build_run(config_of(files, logits_chunk_tokens=3, mesh=mesh, eval={"split": "train"})).scorer.scores({})
    assert seen == [3 * 4]
