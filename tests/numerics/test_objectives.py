"""One step of each objective, compiled as users compile it: the loss and the trained head against NumPy in float64."""

import jax
import numpy as np
import pytest

from lowrank.core import sharding
from lowrank.objectives import OBJECTIVES
from lowrank.training import build, step
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


def test_every_objective_has_a_case():
    assert set(CASES) == set(OBJECTIVES)


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
