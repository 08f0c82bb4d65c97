"""One step of each objective, compiled as users compile it: the loss and the trained head against NumPy in float64."""

import jax
import numpy as np
import pytest

from lowrank.core import sharding, tree
from lowrank.objectives import OBJECTIVES
from lowrank.training import build, step
from lowrank.training.reference import StoredReference
from lowrank.training.texts import Texts
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

LR = np.float32(0.5)


def next_tokens(network, params, batch):
    """`(features, targets, weights)` of every token."""
    features = network.apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segments"], method="features"
    )
    return features, batch["targets"], batch["weights"]


def labels(network, params, batch):
    """`(features, targets, weights)` of every row."""
    features = network.apply({"params": params}, batch["tokens"], segments=batch["segments"], method="pooled")
    return features, batch["labels"], batch["valid"]


CASES = {"causal_lm": ("llama", next_tokens), "classification": ("bert", labels)}
# The loss of a comparison where the model is its own reference, and the slope of the loss in a log-ratio of the first
# answer: of an answer that is not chosen or not desirable, it is the negative of that.
COMPARED = {"preference": (np.log(2), -0.1 / 2), "kto": (0.5, -0.1 / 4)}


def test_every_objective_has_a_case():
    assert {*CASES, *COMPARED, "grpo", "reward"} == set(OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_the_head_is_that_of_float64(name, files):
    model, read = CASES[name]
    options = {"optim__name": "sgd", "optim__clip": 0.0, "optim__weight_decay": 0.0, "mesh__data": 1}
    config = config_of(files, "method=head", model, objective=name, **options)
    config.model.update({"pooling": "mean"} if model == "bert" else {})
    run = build.build_run(config)
    optimizer = run.optimizer()
    state, frozen, _ = run.start(run.load().params, optimizer)
    batch = sharding.make_global_batch(next(run.loader), run.mesh)
    params = run.attach(run.load().params)[0]
    features, targets, weights = (np.asarray(x) for x in jax.device_get(read(run.network, params, batch)))
    head = {name: np.float64(x) for name, x in params["head"].items()}

    program = step.compile_step(run.step(optimizer), state, frozen, batch)
    state, metrics = program(state, frozen, batch, LR)

    x_NxD = np.float64(features).reshape(-1, features.shape[-1])
    logits_NxV = x_NxD @ head["kernel"] + head.get("bias", 0.0)
    shifted = logits_NxV - logits_NxV.max(-1, keepdims=True)
    log_probs_NxV = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows, targets, weights = np.arange(len(x_NxD)), targets.reshape(-1), np.float64(weights).reshape(-1)
    gradient_NxV = np.exp(log_probs_NxV)
    gradient_NxV[rows, targets] -= 1
    gradient_NxV *= weights[:, None] / weights.sum()
    assert_close(metrics["loss"], -np.sum(log_probs_NxV[rows, targets] * weights) / weights.sum(), relative=1e-5)
    expected = {"bias": gradient_NxV.sum(0), "kernel": x_NxD.T @ gradient_NxV}
    for leaf, before in head.items():
        moved = np.float64(state.trained["head"][leaf]) - before
        assert_close(moved, -LR * expected[leaf], relative=2e-5, name=leaf)


def head_step(objective, files, records="pairs"):
    """`(run, parameters before, batch, state and metrics after)` of a step of gradient descent on these records."""
    options = {"optim__name": "sgd", "optim__clip": 0.0, "optim__weight_decay": 0.0, "mesh__data": 1}
    config = config_of(files, "method=head", data__source=f"jsonl:{files / f'{records}.jsonl'}", **options)
    with config.ignore_type():
        config.objective = objective
    run = build.build_run(config)
    optimizer = run.optimizer()
    state, frozen, _ = run.start(run.load().params, optimizer)
    params = jax.device_get(run.attach(run.load().params)[0])
    reference = StoredReference(run)
    reference.fill(params)
    batch = Texts(run).write(next(run.loader), lambda: tree.join(state.trained, frozen), 0)
    placed = run.put(reference.join(batch))
    program = step.compile_step(run.step(optimizer), state, frozen, placed)
    return run, params, batch, *program(state, frozen, placed, LR)


@pytest.mark.parametrize("name", COMPARED)
def test_the_first_step_of_a_comparison_is_that_of_float64(name, files):
    run, params, batch, state, metrics = head_step(name, files)
    loss, slope = COMPARED[name]
    assert_close(metrics["loss"], loss, relative=1e-6)
    rows = {key: batch[key].reshape(-1, batch[key].shape[-1]) for key in run.objective.row_format.per_token}
    features, targets, weights = (np.asarray(x) for x in next_tokens(run.network, params, rows))
    chosen = batch["desirable"] == 1 if name == "kto" else np.tile([True, False], len(batch["tokens"]))
    slopes = np.where(chosen, slope, -slope) / len(batch["tokens"])
    kernel = np.float64(params["head"]["kernel"])
    moved = np.float64(state.trained["head"]["kernel"]) - kernel
    gradient = head_gradient(features, kernel, targets, np.float64(weights) * slopes[:, None])
    assert_close(moved, -LR * gradient, relative=5e-5)


def head_gradient(features, kernel, targets, slopes, temperature=1.0):
    """`[D, V]`: of the sum of the targets' log-probabilities times `slopes` `[R, T]`, where the kernel makes logits."""
    x_NxD = np.float64(features).reshape(-1, features.shape[-1])
    logits_NxV = x_NxD @ kernel / temperature
    probabilities = np.exp(logits_NxV - logits_NxV.max(-1, keepdims=True))
    gradient_NxV = -probabilities / probabilities.sum(-1, keepdims=True)  # of the log-probability of the target
    gradient_NxV[np.arange(len(x_NxD)), targets.reshape(-1)] += 1
    return x_NxD.T @ (gradient_NxV * slopes.reshape(-1, 1)) / temperature


@pytest.mark.parametrize("loss", ["dapo", "rloo"])
def test_a_step_on_texts_with_rewards_is_that_of_float64(loss, files):
    options = {"loss": loss, "reward_funcs": "grounded", "group_size": 4, "max_new": 8, "temperature": 0.7}
    run, params, batch, state, metrics = head_step({"name": "grpo", **options}, files, "records")
    features, targets, learned = (np.asarray(x) for x in next_tokens(run.network, params, batch))
    rewards = np.float64(batch["reward"]).reshape(-1, 4)
    away = rewards - rewards.mean(1, keepdims=True)
    advantages = away / (rewards.std(1, ddof=1, keepdims=True) + 1e-4) if loss == "dapo" else away * 4 / 3
    weight = learned.sum() if loss == "dapo" else len(learned)
    counted = learned.sum(1) if loss == "dapo" else 1
    assert np.abs(advantages).max() > 0.1
    assert_close(metrics["loss"], -np.sum(advantages.reshape(-1) * counted) / weight, relative=1e-5, size=1)
    kernel = np.float64(params["head"]["kernel"])
    slopes = -np.float64(learned) * advantages.reshape(-1, 1) / weight
    moved = np.float64(state.trained["head"]["kernel"]) - kernel
    assert_close(moved, -LR * head_gradient(features, kernel, targets, slopes, 0.7), relative=5e-5)


def test_a_step_of_the_head_of_rewards_is_that_of_float64(files):
    run, params, batch, state, metrics = head_step({"name": "reward", "centering": 0.1}, files)
    tokens, segments = (batch[key].reshape(-1, batch[key].shape[-1]) for key in ("tokens", "segments"))
    pooled = run.network.apply({"params": params}, tokens, segments=segments, method="pooled")
    pooled_Bx2xD, kernel = np.float64(pooled).reshape(-1, 2, pooled.shape[-1]), np.float64(params["head"]["kernel"])
    rewards_Bx2 = (pooled_Bx2xD @ kernel)[..., 0]
    gap_B, sum_B = rewards_Bx2[:, 0] - rewards_Bx2[:, 1] - batch["margin"][:, 0], rewards_Bx2.sum(1)
    assert_close(metrics["loss"], np.mean(np.log1p(np.exp(-gap_B)) + 0.1 * sum_B**2), relative=1e-5)
    slope_B = -1 / (1 + np.exp(gap_B))
    slopes_Bx2 = np.stack([slope_B, -slope_B], 1) + 0.2 * sum_B[:, None]
    gradient_D = np.einsum("bm,bmd->d", slopes_Bx2, pooled_Bx2xD) / len(gap_B)
    moved = np.float64(state.trained["head"]["kernel"])[:, 0] - kernel[:, 0]
    assert_close(moved, -LR * gradient_D, relative=5e-5)
