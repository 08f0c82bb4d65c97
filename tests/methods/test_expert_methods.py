"""PERFT and ESFT on a mixture of experts: their formulas in float64 NumPy, and whole runs."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from lowrank import methods
from lowrank.adapters import adapter_files, load
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo, Sums
from lowrank.core.weight import Weight, dot, form, frozen, grouped, materialize
from lowrank.methods.esft import relevance, select_experts
from lowrank.models import DecoderConfig
from lowrank.models.moe import MoE
from lowrank.training import loop
from lowrank.training.log import read_metrics
from lowrank.weights import selected_experts
from tests.support import tiny_checkpoint as tiny
from tests.support.checkpoint_files import tensors, write_directory
from tests.support.close import assert_close
from tests.support.thinning import leave
from tests.support.tiny_models import SIZES, decoder, run, tokens
from tests.support.tiny_runs import config_of

B, T, D, E, F, K = 2, 3, 6, 4, 5, 2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("own", [3, 0])
def test_perft_adds_low_rank_experts_by_their_own_router_or_the_mixtures(own):
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    layer = MoE(E, K, F, "silu", routed=(2, own, 1, 0.5))
    init, apply = jax.jit(layer.init), jax.jit(layer.apply)
    params = jax.tree.map(lambda p: np.asarray(10 * p), init(jax.random.key(1), x)["params"])
    at_init = apply({"params": params}, x)
    plain = {name: p for name, p in params.items() if name != "routed"}
    np.testing.assert_array_equal(at_init, jax.jit(MoE(E, K, F, "silu").apply)({"params": plain}, x))
    routed = params["routed"]
    routed["up"]["kernel"] = np.asarray(jax.random.normal(jax.random.key(2), routed["up"]["kernel"].shape))
    added = np.asarray(apply({"params": params}, x) - at_init, np.float64).reshape(-1, D)
    router = (routed if own else params)["router"]["kernel"]
    down, up, router = (np.asarray(p, np.float64) for p in (routed["down"]["kernel"], routed["up"]["kernel"], router))
    for token, found in zip(np.asarray(x, np.float64).reshape(-1, D), added, strict=True):
        probs = softmax(token @ router)
        best = np.argsort(-probs)[: 1 if own else K]
        assert_close(found, 0.5 * sum(probs[e] * (token @ down[e] @ up[e]) for e in best))


def test_only_chosen_experts_meet_their_change():
    kernel = jax.random.normal(jax.random.key(0), (E, D, F))
    w = selected_experts.SelectedExperts(
        base=kernel, delta=jax.random.normal(jax.random.key(1), (3, D, F)), rows=jnp.array([2, 0, E])
    )
    whole = np.asarray(kernel, np.float64).copy()
    whole[[2, 0]] += np.asarray(w.delta, np.float64)[:2]
    assert_close(jax.jit(materialize)(w), whole)
    x, sizes = jax.random.normal(jax.random.key(2), (9, D)), jnp.array([2, 3, 3, 1], jnp.int32)
    rows = np.stack(
        [np.asarray(row, np.float64) @ whole[e] for row, e in zip(x, [0, 0, 1, 1, 1, 2, 2, 2, 3], strict=True)]
    )
    assert_close(jax.jit(grouped)(x, w, sizes), rows)

    def gradient(multiply):
        loss = lambda d: jnp.sum(jnp.sin(multiply(x, dataclasses.replace(w, delta=d), sizes)))  # noqa: E731
        return jax.jit(jax.grad(loss))(w.delta)

    fast, slow = gradient(grouped), gradient(lambda x, w, sizes: jax.lax.ragged_dot(x, w.materialize(), sizes))
    assert_close(fast, slow)
    assert not np.any(fast[2])


def test_a_stack_of_chosen_experts_slices_as_it_materializes():
    kernel = jax.random.normal(jax.random.key(0), (2, E, D, F))
    w = selected_experts.attach(kernel, 2)
    np.testing.assert_array_equal(materialize(w), kernel)
    w = selected_experts.SelectedExperts(base=kernel, delta=w.delta + 1, rows=jnp.array([[1, 3], [0, E]]))
    for i in range(2):
        np.testing.assert_array_equal(materialize(jax.tree.map(lambda leaf, i=i: leaf[i], w)), materialize(w)[i])


SEEN = []


@form
class Spy(Weight):
    base: object = frozen()

    def dot(self, x):
        y = dot(x, self.base)
        if not isinstance(y, jax.core.Tracer):
            SEEN.append(np.asarray(y))
        return y


@pytest.fixture(scope="module")
def mixture():
    """`(model, params, ids, segments, logits)`: a model with mixtures, tokens, and what its routers say of them."""
    model, params = decoder("moe")
    ids = tokens(2)
    segments = np.ones_like(ids)
    segments[1, 7:] = 0
    spied = flatten_dict(params, sep="/")
    spied["layers/mlp/router/kernel"] = Spy(base=spied["layers/mlp/router/kernel"])
    SEEN.clear()
    with jax.disable_jit():  # the layers' scan is a loop then, which the spy sees the values of
        model.apply({"params": unflatten_dict(spied, sep="/")}, ids, segments=segments)
    return model, params, ids, segments, np.stack(SEEN).astype(np.float64)


@pytest.mark.parametrize("score", ["gate", "token"])
def test_relevance_is_the_mean_gate_or_the_share_of_choices_over_real_tokens(score, mixture):
    model, params, ids, segments, logits = mixture

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"], segments=batch["segments"])
        return Sums(jnp.sum(logits), jnp.float32(1))

    batch = {"tokens": jnp.asarray(ids), "segments": jnp.asarray(segments)}
    context = types.SimpleNamespace(
        model=model.config,
        loss=loss,
        batches=lambda n: [batch] * n,
        batch_info=lambda batch: BatchInfo(batch["segments"]),
    )
    found = relevance(params, context, score, 2)["layers"]
    probs = softmax(logits)
    kept = probs >= np.sort(probs, axis=-1)[..., -2:-1]
    use = np.where(kept, probs if score == "gate" else 0.5, 0) * segments[None, :, :, None]
    use = use.sum((1, 2))
    assert_close(found, use / use.sum(-1, keepdims=True))


def test_the_fewest_experts_that_reach_the_share_are_chosen():
    used = np.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert select_experts(used, 0.5, 3).tolist() == [[1, 4, 4], [0, 1, 4]]
    assert select_experts(used, 0.6, 3).tolist() == [[1, 3, 4], [0, 1, 2]]
    assert select_experts(used, 1.0, 2).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize(("score", "share"), [("gate", 0.1), ("token", 0.2)])
def test_the_default_share_is_the_papers(score, share, monkeypatch):
    shares = []
    module = importlib.import_module("lowrank.methods.esft")  # the package has a function of this name
    monkeypatch.setattr(module, "relevance", lambda *args: {"layers": np.full((2, E), 1 / E)})
    monkeypatch.setattr(
        module, "select_experts", lambda used, share, slots: shares.append(share) or np.zeros((2, slots))
    )
    method = methods.build_method({"name": "esft", "score": score, "target": ".*kernel"})
    params = methods.attach(method, {"layers": {"mlp": {"kernel": jnp.ones((2, E, D, F))}}}, jax.random.key(0))
    method.hooks.calibrate(params, None)
    assert shares == [share]


MOE = {
    "model_type": "olmoe",
    "vocab_size": len(tiny.vocabulary()),
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    tiny.llama(folder / "llama")
    tiny.records(folder / "records.jsonl")
    write_directory(folder / "moe", MOE, {n: x * (0.2 if x.ndim > 1 else 1) for n, x in tensors(MOE).items()})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "moe" / name).write_text((folder / "llama" / name).read_text())
    return folder


ARGS = {
    "perft": "method=perft,width=4,experts=2",
    "esft": "method=esft,share=0.4,capacity=0.5,batches=1",
    "lora": "method=lora,rank=2,target=layers/mlp/experts/(up|down)/kernel",
}


@pytest.mark.parametrize("name", leave(ARGS, ("lora",)))
def test_a_mixture_learns_on_a_mesh_and_its_adapter_comes_back(name, files, tmp_path):
    config = config_of(files, ARGS[name], "moe", optim__lr=0.05, checkpoint__every=0)
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    loop.run(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(found[-2:]) < np.mean(found[:2]) - 0.02
    again = load.load_adapted(tmp_path / "adapter", str(files / "moe")).params
    if name == "lora":  # written in PEFT's format, whose round trip tests/parity holds to peft
        w = again["layers"]["mlp"]["experts"]["up"]["kernel"]
        assert np.any(w.b)
        return
    held = load_file(tmp_path / "adapter" / adapter_files.ARRAYS)
    leaves = dict(tree.named_leaves(again))
    for leaf, array in held.items():
        np.testing.assert_array_equal(leaves[leaf], array, err_msg=leaf)
    if name == "esft":
        rows = [x for leaf, x in held.items() if leaf.endswith("rows")]
        assert len(rows) == 3
        assert all(np.any(x < 4) for x in rows)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("method=perft", "routed_width needs a mixture of experts, and the model has none"),
        ("method=esft", r"target '\(layers\|top\)/mlp/experts/.* matches no leaf"),
        ("method=esft,target=layers/mlp/up/kernel", "layers/mlp/up/kernel does not hold experts"),
    ],
)
def test_a_dense_model_is_refused(arg, message, files, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.run(config_of(files, arg, mesh__data=1), tmp_path / "w")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "perft", "width": 0}, "method.width must be positive"),
        ({"name": "perft", "per_token": 9}, r"method.per_token=9 is not in 1\.\.4"),
        ({"name": "esft", "score": "gates"}, r"unknown ESFT score 'gates' \(did you mean 'gate'"),
        ({"name": "esft", "share": 1.5}, "method.share must be at most 1"),
        ({"name": "esft", "capacity": 0.0}, "method.capacity must be positive"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        methods.build_method(group)


def test_perft_trains_what_it_adds():
    model, params = decoder("moe", routed_width=2, routed_experts=3)
    method = methods.build_method({"name": "perft", "width": 2, "experts": 3})
    trained = tree.leaf_names(tree.split(params, methods.trainable_mask(method, params))[0])
    assert sorted(trained) == [f"layers/mlp/routed/{n}/kernel" for n in ("down", "router", "up")]
    assert DecoderConfig(**SIZES, layers=1, kv_heads=4, head_dim=4, experts=2, routed_width=1).routed_experts == 0
    assert run(model, params, tokens(1)).shape == (1, 12, 16)
