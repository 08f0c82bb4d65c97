"""Methods that choose among the parameters there are: which places, which rows, and what an adapter holds of them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import methods
from lowrank.adapters import load
from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import Sums
from lowrank.core.weight import materialize
from lowrank.methods.features import FeatureCache
from lowrank.methods.sparse import SEEING
from lowrank.training import build, loop
from lowrank.training.log import read_metrics
from lowrank.weights.sparse import Sparse
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.decoder_steps import compile_on_decoder, count_bytes
from tests.support.tiny_models import decoder, run
from tests.support.tiny_runs import config_of, train_shortly

IN, OUT, ROWS, STEPS, LR = 6, 5, 4, 2, 0.1


def regression():
    """`(W, batches)` of a least-squares problem, whose gradients are known: `2 x (x W - y)` an example."""
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(ROWS, IN)), "y": rng.normal(size=(ROWS, OUT))} for _ in range(STEPS)]
    return rng.normal(size=(IN, OUT)), batches


def squares(params, batch):
    error = batch["x"] @ materialize(params["attn"]["q"]["kernel"]) - batch["y"]
    return Sums(jnp.sum(error**2), jnp.float32(len(error)))


def expected(choose, w, batches):
    """The papers' scores in float64."""
    each = [np.einsum("ri,ro->rio", 2 * b["x"], b["x"] @ w - b["y"]) for b in batches]  # a gradient an example
    if choose == "fisher":
        return sum((g**2).sum(0) for g in each)
    if choose == "saliency":
        return np.abs(w * sum(g.mean(0) for g in each))
    if choose == "magnitude":
        return np.abs(w)
    moved, m, v = w.copy(), 0, 0  # Adam (Kingma & Ba 2015)
    for t, b in enumerate(batches, 1):
        g = np.einsum("ri,ro->io", 2 * b["x"], b["x"] @ moved - b["y"]) / ROWS
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        moved = moved - LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return np.abs(moved - w)


@pytest.mark.parametrize("scope", ["kernel", "model"])
@pytest.mark.parametrize("choose", ["magnitude", "fisher", "saliency", "movement"])
def test_the_places_have_the_largest_scores_of_the_paper(choose, scope):
    w, batches = regression()
    seeing = {"batches": STEPS} if choose in SEEING else {}
    moving = {"warm_lr": LR} if choose == "movement" else {}
    group = {"name": "sparse", "density": 0.3, "choose": choose, "scope": scope, **seeing, **moving}
    method = methods.build_method(group)
    params = methods.attach(method, {"attn": {"q": {"kernel": jnp.asarray(w, jnp.float32)}}}, jax.random.key(0))
    if method.hooks.calibrate:
        arrays = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), b) for b in batches]
        context = types.SimpleNamespace(batches=lambda n: arrays[:n], loss=squares, key=jax.random.key(1))
        params = method.hooks.calibrate(params, context)
    found = params["attn"]["q"]["kernel"]
    indices = found.indices[found.indices < IN * OUT]
    assert indices.shape == (9,)
    assert set(indices.tolist()) == set(np.argsort(-expected(choose, w, batches).ravel())[:9].tolist())
    np.testing.assert_array_equal(materialize(found), w.astype(np.float32))  # rewound


@pytest.mark.parametrize("factor", [1.0, 1.5, 4.0])
def test_the_largest_scores_of_the_model_are_chosen_within_the_slots_of_each_kernel(factor):
    rng = np.random.default_rng(0)  # whole numbers, of which many are equal
    stack = np.round(rng.normal(size=(3, IN, OUT)) * np.array([1, 3, 9])[:, None, None]).astype(np.float32)
    params = {"layers": {"mlp": {"up": {"kernel": stack}}}, "mlp": {"up": {"kernel": np.round(4 * stack[0])}}}
    method = methods.build_method({"name": "sparse", "density": 0.2, "scope": "model", "capacity_factor": factor})
    adapted = methods.attach(method, jax.tree.map(jnp.asarray, params), jax.random.key(0))
    placed = method.hooks.calibrate(adapted, types.SimpleNamespace(key=jax.random.key(1)))
    found = np.concatenate([w.indices.reshape(-1, w.indices.shape[-1]) for w in weights_of(placed)])
    scores = np.abs(np.concatenate([stack.reshape(3, -1), params["mlp"]["up"]["kernel"].reshape(1, -1)]))
    slots = round(factor * 0.2 * IN * OUT)
    fits = np.argsort(-scores, axis=1, kind="stable")[:, :slots]
    order = np.argsort(-np.take_along_axis(scores, fits, axis=1).ravel(), kind="stable")[: round(0.2 * scores.size)]
    want = sorted((i // slots, fits.ravel()[i]) for i in order)
    assert [(row, i) for row, line in enumerate(found.tolist()) for i in line if i < IN * OUT] == want


def test_a_run_over_the_whole_model_moves_exactly_its_share(files, tmp_path):
    group = "method=sparse,density=0.05,scope=model,choose=fisher,batches=1"
    _, loaded = train_shortly(files, group, tmp_path)
    forms = [w for w in weights_of(loaded.params) if isinstance(w, Sparse)]
    moved = sum(np.count_nonzero(materialize(w) - w.base) for w in forms)
    assert moved == round(0.05 * sum(w.base.size for w in forms))


def weights_of(params):
    return [w for _, w in tree.named_leaves(params, weight.is_weight)]


def test_scores_that_are_not_finite_are_refused():
    method = methods.build_method({"name": "sparse", "scope": "model"})
    params = methods.attach(method, {"mlp": {"up": {"kernel": jnp.full((4, 4), jnp.nan)}}}, jax.random.key(0))
    with pytest.raises(UserError, match="scores of mlp/up/kernel are not finite"):
        method.hooks.calibrate(params, types.SimpleNamespace(key=jax.random.key(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "modle"}, r"unknown scope in method.scope 'modle' \(did you mean 'model'\?\)"),
        ({"capacity_factor": 2.0}, r"capacity_factor=2.0 does not act with method.scope=kernel"),
        ({"scope": "model", "capacity_factor": 0.5}, r"capacity_factor must be at least 1"),
    ],
)
def test_a_scope_that_cannot_be_chosen_within_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        methods.build_method({"name": "sparse", **options})


def test_random_places_are_distinct_and_differ_from_layer_to_layer():
    method = methods.build_method({"name": "sparse", "density": 0.5, "choose": "random"})
    base = {"layers": {"mlp": {"up": {"kernel": jnp.ones((3, IN, OUT))}}}}
    found = methods.attach(method, base, jax.random.key(0))["layers"]["mlp"]["up"]["kernel"].indices
    assert [len(set(row.tolist())) for row in found] == [15] * 3
    assert len({tuple(row.tolist()) for row in found}) == 3


def test_a_run_that_goes_on_keeps_its_places_and_does_not_choose_again(files, tmp_path, monkeypatch):
    arg = "method=sparse,density=0.05,choose=saliency,batches=1,target=.*down/kernel"
    config = config_of(files, arg, steps=2, mesh__data=1, checkpoint__every=1)
    batch, choose, seen = loop.Trainer._batch, SEEING["saliency"], []

    def broken(run, done, saves):
        seen.append(run.frozen)
        if len(seen) == 2:
            raise UserError("the power is gone")
        return batch(run, done, saves)

    monkeypatch.setattr(loop.Trainer, "_batch", broken)
    with pytest.raises(UserError, match="the power is gone"):
        loop.run(config, tmp_path)
    monkeypatch.setitem(SEEING, "saliency", lambda *args, **kw: jax.tree.map(jnp.negative, choose(*args, **kw)))
    loop.run(config, tmp_path)
    first, last = ({n: x for n, x in tree.named_leaves(p) if n.endswith("indices")} for p in (seen[0], seen[-1]))
    assert first
    jax.tree.map(np.testing.assert_array_equal, first, last)
    assert_holds(tmp_path / "adapter", str(files / "llama"), places=first)


def assert_holds(directory, base, places):
    """The adapter holds the places and their values, and the model that it gives back has them there."""
    arrays, loaded = load_file(directory / "trained.safetensors"), load.load_adapted(directory, base)
    assert {n for n in arrays if n.endswith("indices")} == set(places)
    leaves = dict(tree.named_leaves(loaded.params, weight.is_weight))
    for name in {n.rpartition("/")[0] for n in arrays}:
        change = np.asarray(materialize(leaves[name]) - leaves[name].base).reshape(tiny.LAYERS, -1)
        want = np.zeros_like(change)
        np.put_along_axis(want, arrays[f"{name}/indices"], arrays[f"{name}/values"], axis=1)
        assert_close(change, want, relative=5e-5)
        assert np.any(want)


def test_a_sparse_step_keeps_no_dense_gradients_or_moments():
    method = methods.build_method({"name": "sparse", "density": 0.005})
    compiled, state, frozen, _ = compile_on_decoder(method, (1, 1, 1), 32, width=128, layers=8)
    kernels = count_bytes({n: x for n, x in tree.named_leaves(frozen) if n.endswith("base")})
    assert count_bytes(state) < 0.006 * kernels
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * kernels  # dense gradients alone would add one more


def test_learned_rows_are_rows_of_the_embedding_and_of_a_head_that_shares_it():
    model, params = decoder("windowed")  # tied
    method = methods.build_method({"name": "tokens", "tokens": (3, 1)})
    adapted = methods.attach(method, params, jax.random.key(0))
    table = adapted["embed"]["embedding"]
    moved = table.__class__(**{**vars(table), "rows": table.rows + 0.5})
    ids = np.array([[1, 2, 3, 4, 3]], np.int32)
    live = run(model, {**adapted, "embed": {"embedding": moved}}, ids, method="__call__")
    plain = params["embed"]["embedding"].at[jnp.array([3, 1])].add(0.5)
    want = run(model, {**params, "embed": {"embedding": plain}}, ids, method="__call__")
    assert_close(live, want)
    assert np.abs(want - run(model, params, ids, method="__call__")).max() > 0.1


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_lora_on_an_embedding_moves_it_and_a_head_that_shares_it(name):
    model, params = decoder("windowed")  # tied
    method = methods.build_method({"name": name, "rank": 2, "alpha": 6.0, "target": "embed/embedding"})
    adapted = methods.attach(method, params, jax.random.key(0))
    table = adapted["embed"]["embedding"]
    assert not np.any(table.a)
    assert np.any(table.b)
    moved = dataclasses.replace(table, a=jax.random.normal(jax.random.key(1), table.a.shape))
    ids = np.array([[1, 2, 3, 4, 3]], np.int32)
    live = run(model, {**adapted, "embed": {"embedding": moved}}, ids, method="__call__")
    want = run(model, {**params, "embed": {"embedding": materialize(moved)}}, ids, method="__call__")
    assert_close(live, want)
    assert np.abs(want - run(model, params, ids, method="__call__")).max() > 0.1


@pytest.mark.parametrize(
    ("group", "culprit"),
    [
        ({"name": "lora", "init": "pissa"}, "init=pissa decomposes a kernel, and embed/embedding is an embedding"),
        ({"name": "loha"}, "embed/embedding is not a kernel"),
    ],
)
def test_what_an_embedding_cannot_take_is_refused(group, culprit):
    _, params = decoder("windowed")
    with pytest.raises(UserError, match=culprit):
        methods.attach(methods.build_method({**group, "target": "embed/embedding"}), params, jax.random.key(0))


@pytest.mark.parametrize(
    ("arg", "culprit"),
    [
        ("tokens=999", "999 is not an id of the vocabulary of"),
        ("tokens=the cat", "'the cat' is 2 tokens, not one"),
    ],
)
def test_tokens_that_are_none_are_refused(arg, culprit, files, tmp_path):
    with pytest.raises(UserError) as error:
        train_shortly(files, f"method=tokens,{arg}", tmp_path)
    assert culprit in str(error.value)


def test_a_run_on_chosen_words_learns_their_rows(files, tmp_path):
    _, loaded = train_shortly(files, "method=tokens,tokens=the", tmp_path)
    table = loaded.params["embed"]["embedding"]
    assert table.ids.tolist() == [loaded.tokenizer.encode("the")[0]]
    assert np.abs(np.asarray(materialize(table) - table.base)).sum(1).nonzero()[0].tolist() == table.ids.tolist()


def test_cached_features_train_the_head_as_the_whole_model_does(files, tmp_path):
    losses, changes = {}, {"objective": "classification", "steps": 12, "mesh__data": 1, "data__batch_size": 16}
    changes |= {"checkpoint__every": 0, "optim__lr": 0.05}
    tiny.bert(files / "bert")
    for method in ("head", "features"):
        config = config_of(files, f"method={method}", "bert", **changes)
        config.model.pooling = "mean"
        loop.run(config, tmp_path / method)
        losses[method] = [line["train/loss"] for line in read_metrics(tmp_path / method / "metrics.jsonl")]
    assert_close(losses["features"], losses["head"])
    assert losses["head"][-1] < losses["head"][0]


def test_features_are_computed_once_an_example():
    network = types.SimpleNamespace(calls=0)

    def apply(variables, ids, segments, method):
        jax.debug.callback(lambda: setattr(network, "calls", network.calls + 1))
        return jnp.sum(ids * segments, axis=1, keepdims=True) * variables["params"]

    network.apply = apply
    cache = FeatureCache(network, jnp.float32(2.0))
    batch = {"tokens": np.array([[1, 2, 9], [3, 0, 0]], np.int32), "labels": np.array([0, 1])}
    batch["segments"] = np.array([[1, 1, 0], [1, 0, 0]], np.int32)
    for order in ([0, 1], [1, 0], [0, 0]):
        found = cache({name: x[order] for name, x in batch.items()})
        np.testing.assert_array_equal(found["pooled"], np.array([[6.0], [6.0]])[order])
        np.testing.assert_array_equal(found["labels"], batch["labels"][order])
        assert "tokens" not in found
    jax.effects_barrier()
    assert network.calls == 1
    with pytest.raises(UserError, match="it cannot train norm/scale"):
        FeatureCache(network, {"head": {"kernel": None}, "norm": {"scale": None}})


def test_features_need_an_objective_that_reads_no_more(files):
    with pytest.raises(UserError, match="objective=classification"):
        build.build_run(config_of(files, "method=features"))


def test_a_run_trains_a_lora_on_the_embedding_and_peft_can_hold_it(files, tmp_path):
    _, loaded = train_shortly(files, "method=lora,target=embed/embedding|.*attn/q/kernel", tmp_path)
    table = loaded.params["embed"]["embedding"]
    assert np.any(table.a)
    assert type(table).__name__ == "LoRA"
