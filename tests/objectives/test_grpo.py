"""The losses of texts with rewards, beside float64 NumPy and worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.objectives import build_objective
from lowrank.objectives.policy_losses import LOSSES, clipped_loss, divergence, leave_one_out, standardized
from lowrank.objectives.rewards import Sample
from tests.support.close import assert_close

P, G, T, V, MAX_NEW = 2, 3, 9, 7, 5
B = P * G
REWARDS = np.array([[1.0, 0.0, 0.0, 1.0]])
GROUP = {"name": "grpo", "reward_funcs": "grounded", "group_size": G, "max_new": MAX_NEW}


class Network:
    """The features of a token are its logits, a row of a table."""

    @staticmethod
    def apply(variables, x, *unused, method):
        return variables["params"][x] if method == "features" else x


def test_advantages_are_the_worked_numbers():
    assert_close(standardized(REWARDS)[0], np.array([1, -1, -1, 1]) * 0.86587542)
    assert_close(leave_one_out(REWARDS)[0], np.array([1, -1, -1, 1]) * 2 / 3)
    assert_close(LOSSES["dr_grpo"].advantages(REWARDS)[0], np.array([0.5, -0.5, -0.5, 0.5]))


def test_the_clip_takes_the_gradient_where_a_text_is_already_as_likely_as_it_may_be():
    ratios, advantages = np.array([1.5, 1.5, 0.5, 0.5, 1.1]), np.array([1.0, -1.0, 1.0, -1.0, 2.0])
    log_ratios = jnp.log(jnp.asarray(ratios, jnp.float32))
    loss, low, high = clipped_loss(log_ratios, jnp.asarray(advantages, jnp.float32), 0.2, 0.3)
    assert_close(loss, [-1.3, 1.5, -0.5, 0.8, -2.2])
    slopes = jax.grad(lambda x: jnp.sum(clipped_loss(x, jnp.asarray(advantages, jnp.float32), 0.2, 0.3)[0]))(log_ratios)
    assert_close(slopes, [0.0, 1.5, -0.5, 0.0, -2.2])
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [(0, 1), (0, 0), (0, 0), (1, 0), (0, 0)]


def test_the_divergence_is_that_of_the_reference_and_never_negative():
    assert_close(divergence(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.5])), [np.exp(-1), np.exp(0.5) - 1.5])
    assert divergence(jnp.float32(-3), jnp.float32(-3)) == 0


def drawn():
    """`(table of logits, a batch of texts, the generator that drew them)`."""
    rng = np.random.default_rng(0)
    lengths = np.array([2, 5, 3, 1, 5, 4])[:, None]
    learned = (np.arange(T) >= 3) & (np.arange(T) < 3 + lengths)
    batch = {name: rng.integers(0, V, (B, T)) for name in ("tokens", "targets")}
    batch |= {name: np.zeros((B, T), np.int32) for name in ("positions", "segments")}
    batch |= {"prompt": np.tile(np.arange(T) < 4, (B, 1)), "valid": np.ones(B, np.int32)}
    batch |= {"weights": learned.astype(np.float32), "advantage": rng.normal(size=B).astype(np.float32)}
    table = rng.normal(size=(V, V)).astype(np.float32)
    return table, batch, rng


def in_float64(table, batch, loss, temperature, beta, low, high):
    """The loss and the divergence by the definition, text by text and token by token."""
    logits = np.float64(table)[batch["tokens"]] / temperature
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logps = np.take_along_axis(logps, batch["targets"][..., None], -1)[..., 0]
    total, weight, divergences = 0.0, 0.0, []
    for b in range(B):
        places, A = np.flatnonzero(batch["weights"][b]), np.float64(batch["advantage"][b])
        ratios = np.exp(logps[b, places] - np.float64(batch["old_log_probs"][b, places]))
        ratios = np.prod(ratios, keepdims=True) if loss == "rloo" else ratios
        surrogate = -np.minimum(ratios * A, np.clip(ratios, 1 - low, 1 + high) * A)
        d = np.float64(batch["reference"][b, places]) - logps[b, places]
        divergences += list(np.exp(d) - d - 1)
        text = surrogate.sum() + beta * (np.exp(d) - d - 1).sum()
        total += text / len(places) if loss == "grpo" else text
        weight += {"dapo": len(places), "dr_grpo": MAX_NEW}.get(loss, 1)
    return total, weight, np.mean(divergences)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_that_of_float64(loss):
    table, batch, rng = drawn()
    options = {"loss": loss, "temperature": 0.7, "beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.4, "updates": 2}
    objective = build_objective({**GROUP, **options})
    names = [name for name in objective.row_format.arrays if name not in batch and name != "record"]
    batch |= {name: np.ones(B, np.float32) for name in names}
    start = objective.comparison.row_values(Network, table, batch, 0)
    for name in ("old_log_probs", "reference"):
        noise = rng.normal(0, 0.3, (B, T)) * batch["weights"]
        batch[name] = np.asarray(start + noise, np.float32)
    sums = objective.loss(Network, table, batch, 0)
    total, weight, kl = in_float64(table, batch, loss, 0.7, 0.3, 0.1, 0.4)
    assert_close(sums.total, total)
    assert_close(sums.weight, weight)
    assert_close(sums.metrics["kl"][0] / sums.metrics["kl"][1], kl, relative=1e-4)
    low, high, region = (sums.metrics[f"clip_ratio/{name}_mean"][0] for name in ("low", "high", "region"))
    assert region == low + high > 0
    assert_close(objective.batch_info(batch).weight, weight)


def test_the_first_step_on_texts_has_their_gradient_and_no_clip():
    table, batch, _ = drawn()
    objective = build_objective({**GROUP, "loss": "rloo"})
    batch |= {name: np.ones(B, np.float32) for name in objective.row_format.arrays if name not in batch}
    gradient = jax.grad(lambda table: objective.loss(Network, table, batch, 0).total)(table)
    logits = np.float64(table)[batch["tokens"]]
    slopes = -np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.put_along_axis(
        slopes, batch["targets"][..., None], 1 + np.take_along_axis(slopes, batch["targets"][..., None], -1), -1
    )
    slopes *= -(batch["weights"] * batch["advantage"][:, None])[..., None]
    expected = np.zeros((V, V))
    np.add.at(expected, batch["tokens"], slopes)
    assert_close(gradient, expected)
    assert objective.loss(Network, table, batch, 0).metrics["clip_ratio/region_mean"][0] == 0


def test_texts_are_compared_with_those_of_their_prompt_alone():
    objective = build_objective({**GROUP, "reward_weights": [2.0], "loss": "dr_grpo"})
    texts = ["a b", "a", "c", "b", "b", "b"]
    samples = [Sample({}, "here", "a b", text, [1, 2], text != "c") for text in texts]
    judged = objective.rollout.judge(samples)
    assert judged["reward"].tolist() == [2, 2, 0, 2, 2, 2]
    assert judged["rewards/grounded/mean"].tolist() == [1, 1, 0, 1, 1, 1]
    assert judged["completions/clipped_ratio"].sum() == 1
    found = objective.rollout.compare({**judged, "valid": np.ones(B, np.int32)})
    assert_close(found["advantage"], [2 / 3, 2 / 3, -4 / 3, 0, 0, 0])
    assert_close(found["frac_reward_zero_std"], np.full(B, 0.5))
    assert_close(found["reward_std"], np.full(B, np.std(judged["reward"], ddof=1)))
    filled = objective.rollout.compare({**judged, "valid": np.array([1, 1, 1, 0, 0, 0])})
    assert_close(filled["frac_reward_zero_std"], np.zeros(B), size=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "dapoo"}, "unknown objective.loss 'dapoo' .did you mean 'dapo'"),
        ({"group_size": 1}, "objective.group_size=1 is below 2"),
        ({"max_new": 0}, "objective.max_new=0 is below 1"),
        ({"updates": 0}, "objective.updates=0 is below 1"),
        ({"temperature": 0.0}, "objective.temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "objective.temperature=-1.0 must be above 0"),
        ({"beta": -0.1}, "objective.beta=-0.1 must be 0 or more"),
        ({"epsilon": 0.0}, "objective.epsilon=0.0 must be above 0"),
        ({"epsilon_high": 0.0}, "objective.epsilon_high=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is not in"),
        ({"reward_funcs": []}, "objective.reward_funcs is empty"),
        ({"reward_weights": [1.0, 2.0]}, "objective.reward_weights has 2 weights for 1 function"),
        ({"reward_weights": [float("nan")]}, "objective.reward_weights must be finite"),
        ({"reward_funcs": ["grounde"]}, "unknown reward function 'grounde' .did you mean 'grounded'"),
        ({"reward_funcs": ["no_such.module.f"]}, "no_such.module cannot be imported: ModuleNotFoundError"),
        ({"reward_funcs": ["string.capword"]}, "string has no function 'capword' .did you mean 'capwords'"),
        ({"reward_funcs": ["grounded", "lowrank.objectives.rewards.grounded"]}, "names two functions 'grounded'"),
    ],
)
def test_options_that_are_out_of_range_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        build_objective({**GROUP, **options})
