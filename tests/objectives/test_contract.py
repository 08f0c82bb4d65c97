"""The laws of objectives: each value in the table, and one that compares rows, keeps all of them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree
from lowrank.evaluation import evaluate
from lowrank.objectives import OBJECTIVES
from lowrank.training import build, loop, step
from lowrank.training.log import read_metrics
from lowrank.training.reference import StoredReference
from lowrank.training.texts import Texts
from tests.support.close import assert_close
from tests.support.pair_objective import pairs
from tests.support.thinning import leave
from tests.support.tiny_runs import config_of

NAMES = (*OBJECTIVES, "pairs")
ON_PAIRS = ("kto", "preference", "reward")  # objectives that the records of `pairs.jsonl` are for
OPTIONS = {"grpo": {"reward_funcs": "grounded", "group_size": 2, "max_new": 8, "beta": 0.1}}  # which need some
SUMS = 2e-5  # float32 sums in another order, of a loss that is a small difference of large ones


@pytest.fixture(autouse=True)
def line(monkeypatch):
    """The one line in the table that the toy objective needs."""
    monkeypatch.setitem(OBJECTIVES, "pairs", pairs)


@functools.cache
def _case(name, files):
    """The objective on a tiny model: its compiled functions, and the first and the last batch of an epoch."""
    changes = {"mesh__data": 1, "data__epochs": 1, "data__batch_size": 6, "data__packing": False}
    run = build.build_run(_config(name, files, **changes))
    batches, objective, params = list(run.loader), run.objective, run.load().params
    start = jax.tree.map(lambda x: 0.9 * x, params)

    def prepare(batch):
        written = Texts(run).write(batch, lambda: params, 0)
        return jax.device_get(dict(run.compared(params, start, written, adds_reference=True)))

    return types.SimpleNamespace(
        run=run,
        objective=objective,
        params=params,
        batches=batches,
        first=prepare(batches[0]),
        last=prepare(batches[-1]),  # some of its rows only fill it up
        loss=jax.jit(lambda params, batch: objective.loss(run.network, params, batch, 0)),
        row_sums=jax.jit(lambda params, batch: objective.row_sums(run.network, params, batch, 0)),
    )


@pytest.fixture(params=NAMES)
def case(request, files):
    return _case(request.param, files)


def _config(name, files, **changes):
    """A config of full tuning; the data of a last batch do not fill it."""
    source = {"data__source": f"jsonl:{files / 'pairs.jsonl'}"} if name in ON_PAIRS else {}
    source |= {"data__max_examples": 22} if name in (*ON_PAIRS, *OPTIONS) else {}
    config = config_of(files, "method=full", steps=4, **source, **changes)
    with config.ignore_type():
        config.objective = {"name": name, **OPTIONS.get(name, {})}
    return config


def _written(run, state, frozen):
    """The first batch of a run, with texts where its objective writes some."""
    return Texts(run).write(next(run.loader), lambda: tree.join(state.trained, frozen), 0)


def _rows(batch, index):
    return {name: x[index] for name, x in batch.items()}


def test_the_loader_yields_what_the_row_format_declares(case):
    for batch in case.batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == case.run.loader.shapes


def test_the_loss_is_a_sum_and_its_weight_that_halves_add_up_to(case):
    whole = case.loss(case.params, case.first)
    halves = [case.loss(case.params, _rows(case.first, half)) for half in (slice(0, 3), slice(3, 6))]
    assert whole.weight > 0
    assert_close(jax.tree.map(jnp.add, *halves), whole, relative=SUMS)


def test_the_sums_of_the_rows_add_up_to_the_loss(case):
    total, weight = case.row_sums(case.params, case.first)
    assert total.shape == weight.shape == (6,)
    whole = case.loss(case.params, case.first)
    assert_close(jnp.sum(total), whole.total, relative=SUMS)
    assert_close(jnp.sum(weight), whole.weight)


def test_chunks_of_the_logits_change_neither_the_sums_nor_the_gradient(case):
    value = lambda n: lambda p: case.objective.loss(case.run.network, p, case.first, n).total  # noqa: E731
    (one, gradient), (other, chunked) = (jax.jit(jax.value_and_grad(value(n)))(case.params) for n in (0, 24))
    assert_close(other, one, relative=SUMS)
    for (name, a), (_, b) in zip(tree.named_leaves(chunked), tree.named_leaves(gradient), strict=True):
        assert_close(a, b, relative=1e-4, name=name)


def test_padding_has_no_part_in_the_loss_and_its_gradient(case):
    config, batch = case.run.network.config, case.first
    unused = int(np.setdiff1d(np.arange(config.vocab_size), batch["tokens"])[0])
    other = {**batch, "tokens": np.where(batch["segments"] == 0, unused, batch["tokens"])}
    assert (other["tokens"] == unused).any()
    two, gradient = jax.jit(jax.value_and_grad(lambda p: case.loss(p, other).total))(case.params)
    assert_close(two, case.loss(case.params, batch).total, relative=SUMS)
    table = np.abs(gradient["embed"]["embedding"])
    # The head of a tied model reads every row of the table, so only an untied one has an empty gradient there.
    assert config.tied or not table[unused].any()
    assert table[np.setdiff1d(batch["tokens"], [unused])].any()


def test_rows_that_only_fill_up_a_batch_count_nothing(case):
    valid = case.last["valid"] == 1
    assert 0 < valid.sum() < 6
    whole = case.loss(case.params, case.last)
    assert_close(whole, case.loss(case.params, _rows(case.last, valid)), relative=SUMS)
    assert not np.asarray(case.row_sums(case.params, case.last)[1])[~valid].any()


def test_named_metrics_are_means_of_finite_sums(case):
    for total, weight in case.loss(case.params, case.first).metrics.values():
        assert np.isfinite(total)
        assert weight > 0


def test_methods_read_the_weight_and_the_rows_that_the_model_reads(case):
    info = case.objective.batch_info(case.first)
    assert_close(info.weight, case.loss(case.params, case.first).weight)
    assert info.segments.ndim == 2
    assert info.segments.size == case.first["segments"].size
    assert info.prompt is None or info.prompt.shape == info.segments.shape


def test_the_scores_are_finite_leave_out_filled_rows_and_have_a_better_end(case):
    score = lambda *batches: evaluate(case.objective, case.run.network, case.params, batches)  # noqa: E731
    better, scores = case.objective.score.better, score(case.first, case.last)
    assert np.isfinite(list(scores.values())).all()
    assert better.keys() <= scores.keys()
    assert set(better.values()) <= {"min", "max"}
    arrays = case.objective.row_format.arrays.items()
    blank = {name: np.full_like(case.first[name], a.filler) for name, a in arrays if a.filler is not None}
    blank = {**case.first, **blank, "valid": 0 * case.first["valid"]}
    assert_close(score(case.first, blank), score(case.first))


@pytest.mark.parametrize("name", leave(NAMES, ["reward"]))  # which is the classification of pairs
def test_a_step_on_a_mesh_in_microbatches_is_the_step_of_the_whole_batch(name, files):
    found, texts = {}, None
    for shards, accumulate in ((1, 1), (2, 2)):
        mesh = dict.fromkeys(("data", "fsdp", "context"), shards)
        changes = {"optim__accumulate": accumulate, "optim__name": "sgd", "optim__clip": 0.0, "mesh": mesh}
        run = build.build_run(_config(name, files, **changes))
        optimizer = run.optimizer()
        state, frozen, _ = run.start(run.load().params, optimizer)
        reference = StoredReference(run)
        reference.fill(jax.tree.map(lambda x: 0.9 * x, tree.join(state.trained, frozen)))  # not the start: no ties
        texts = texts or _written(run, state, frozen)
        batch = run.put(reference.join(texts))
        program = step.compile_step(run.step(optimizer), state, frozen, batch)
        state, metrics = program(state, frozen, batch, np.float32(0.1))
        found[shards] = jax.device_get((metrics, state.trained))
    assert_close(found[2], found[1], relative=1e-4)


def test_an_objective_added_by_one_line_trains_is_logged_and_scored(files, tmp_path):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "optim__accumulate": 2, "optim__lr": 0.05}
    config = config_of(files, eval={"split": "train", "every": 4}, checkpoint__every=0, **mesh)
    with config.ignore_type():
        config.objective = {"name": "pairs", "beta": 4.0}
    summary = loop.run(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[-1]["train/rewards/margins"] > lines[0]["train/rewards/margins"]
    assert 0 <= summary["after"]["accuracy"] <= 1
