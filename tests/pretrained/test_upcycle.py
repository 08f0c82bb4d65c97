"""A dense decoder read as a mixture of experts: the same function, on any mesh, and the base that adapters record."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_stored, is_weight
from lowrank.models import build_model
from lowrank.training import loop
from lowrank.training.log import read_metrics
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.checkpoint_files import BERT, GPT2, LLAMA, directory, gguf_twin, tensors
from tests.support.close import assert_close
from tests.support.thinning import leave
from tests.support.tiny_models import run
from tests.support.tiny_runs import config_of

GROUP = {"experts": 4, "top_k": 2}
IDS = np.arange(2, 22, dtype=np.int32).reshape(2, 10)


def logits(read):
    return run(build_model(read.config), read.params, IDS, method="__call__")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(directory(tmp_path_factory.mktemp("dense") / "llama", LLAMA))


@pytest.fixture(scope="module")
def mixture(dense):
    return pretrained.load(dense, upcycled=GROUP)


def test_the_mixture_computes_what_the_dense_model_does(dense, mixture):
    plain = pretrained.load(dense)
    assert_close(logits(mixture), logits(plain))
    mlp = mixture.params["layers"]["mlp"]
    for name, kernel in mlp["experts"].items():
        for e in range(4):
            np.testing.assert_array_equal(kernel["kernel"][:, e], plain.params["layers"]["mlp"][name]["kernel"])
    assert_close(np.std(mlp["router"]["kernel"]), 0.02, relative=0.1)
    assert (mixture.config.experts, mixture.config.experts_per_token) == (4, 2)
    assert (mixture.new, mixture.upcycled) == ((), GROUP)


def test_routers_are_the_groups_and_not_the_runs(dense):
    def routers(**options):
        group = GROUP | {"seed": options.pop("of", 0)}
        return np.asarray(pretrained.load(dense, upcycled=group, **options).params["layers"]["mlp"]["router"]["kernel"])

    np.testing.assert_array_equal(routers(), routers(seed=3, model={"remat": "none"}))
    assert not np.array_equal(routers(), routers(of=1))
    assert not np.array_equal(*routers()[:2])


def test_shapes_are_known_without_weights_and_shards_are_those_of_the_whole(dense):
    options = {"model": {"routed_width": 2, "top_layers": 1}, "upcycled": GROUP, "param_dtype": "bfloat16"}
    _, _, shapes = pretrained.describe(dense, **options)
    whole = pretrained.load(dense, **options)
    parts = pretrained.load(dense, mesh=sharding.make_mesh(2, 2, 2), **options)
    like = jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert like == jax.tree.map(lambda x: (x.shape, x.dtype), whole.params)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert all("/routed/" in name for name in whole.new)


def test_experts_may_be_codes_and_come_from_a_gguf_file(dense, mixture, tmp_path):
    twin = str(gguf_twin(tmp_path / "twin.gguf", LLAMA, tensors(LLAMA), "llama"))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(twin, upcycled=GROUP).params, mixture.params)
    group = {"name": "int8", "target": ".*experts/.*kernel"}
    options = {"upcycled": GROUP, "quantized": group}
    params = pretrained.load(dense, **options).params
    stored = [name for name, w in tree.named_leaves(params, is_weight) if is_stored(w)]
    assert stored == [f"layers/mlp/experts/{n}/kernel" for n in ("down", "gate", "up")]
    assert jax.tree.structure(pretrained.describe(dense, **options)[2]) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("hf", "group", "model", "message"),
    [
        (BERT, GROUP, {}, "is an encoder: model.upcycle makes experts of a gated MLP"),
        (GPT2, GROUP, {}, "is a decoder whose MLP has no gate"),
        ({**LLAMA, "mlp_bias": True}, GROUP, {}, "is a decoder whose MLP has biases"),
        ({**LLAMA, "model_type": "mixtral"}, GROUP, {}, "is a mixture of experts already"),
        (LLAMA, {"experts": 2, "top_k": 3}, {}, r"model\.upcycle\.top_k=3 is not in 1\.\.2, the number of experts"),
        (LLAMA, {"experts": 0, "top_k": 0}, {}, r"top_k=0 is not in 1\.\.0"),
        (LLAMA, {"experts": 2}, {}, r"model\.upcycle\.top_k is missing"),
        (LLAMA, {**GROUP, "topk": 1}, {}, r"'model\.upcycle\.topk' \(did you mean 'model\.upcycle\.top_k'\?\)"),
        (LLAMA, GROUP, {"experts": 8}, r"model\.experts and model\.upcycle both set the mixture"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(hf, group, model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrained.describe(str(directory(tmp_path / "m", hf)), model, upcycled=group)


def test_a_mixture_learns_and_its_adapter_brings_its_base(files, tmp_path):
    changes = {"optim__lr": 0.05, "mesh__data": 1, "checkpoint__every": 0, "model__upcycle": {**GROUP, "seed": 5}}
    loop.run(config_of(files, "method=perft,width=4,experts=2", seed=3, **changes), tmp_path)
    found = [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert np.mean(found[-2:]) < np.mean(found[:2]) - 0.02
    again = load.load_adapted(tmp_path / "adapter", str(files / "llama"))
    assert again.upcycled == {**GROUP, "seed": 5}
    leaves = dict(tree.named_leaves(again.params))
    for leaf, array in load_file(tmp_path / "adapter" / "trained.safetensors").items():
        np.testing.assert_array_equal(leaves[leaf], array, err_msg=leaf)


METHODS = {
    "esft": {"name": "esft"},
    "experts": {"name": "lora", "rank": 2, "target": "layers/mlp/experts/(up|down)/kernel"},
    "attention": {"name": "lora", "rank": 2},
}


@pytest.mark.parametrize("name", leave(METHODS, ("experts",)))
def test_every_adapter_says_what_its_base_is(name, dense, mixture, tmp_path):
    group = METHODS[name]
    params, _ = adapted(mixture.params, group)
    mask = methods.trainable_mask(methods.build_method(group), params)
    kind = adapter_files.save(params, mixture, tmp_path, mask=mask, method=group)
    assert ("PEFT" in kind) == (name == "attention")
    again = load.load_adapted(tmp_path, dense)
    assert_close(logits(again), logits(dataclasses.replace(mixture, params=params)))


def test_a_mixture_is_no_checkpoint_of_the_dense_family(tmp_path):
    read = pretrained.load(str(tiny.llama(tmp_path / "llama")), upcycled=GROUP)
    with pytest.raises(UserError, match=r"model\.experts=4 cannot be written to a llama config\.json"):
        pretrained.export(read.params, read, tmp_path / "out")
