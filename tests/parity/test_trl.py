"""The losses of preferences beside those of TRL's trainers, on the same log-probabilities."""

import collections
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from lowrank.objectives.preference_losses import LOSSES, Pairs
from lowrank.objectives.unpaired_losses import kto_loss, kto_reference_point, reward_loss
from tests.support.close import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the interfaces of trl.experimental may change
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

SAME = 1e-5
B, TOKENS = 6, 9
ACCELERATOR = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
OURS_AND_THEIRS = {  # our loss and its options -> TRL's name and its options
    "dpo": ({}, "sigmoid", {}),
    "hinge": ({}, "hinge", {}),
    "ipo": ({}, "ipo", {}),
    "robust": ({"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    "exo": ({"label_smoothing": 0.05}, "exo_pair", {"label_smoothing": 0.05}),
    "nca": ({}, "nca_pair", {}),
    "bco": ({"shift": False}, "bco_pair", {}),
    "apo_zero": ({}, "apo_zero", {}),
    "apo_down": ({}, "apo_down", {}),
    "dpo_norm": ({}, "sigmoid_norm", {}),
}


def outputs(log_probs):
    """What a model of TRL's returns, with these log-probabilities of tokens."""
    blank = torch.zeros_like(log_probs)
    return types.SimpleNamespace(
        log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool(), log_sum_sq_probs=blank
    )


def trainer(kind, **fields):
    """An instance of a trainer that has these fields alone, and on which no `__init__` has run."""
    made = object.__new__(kind)
    defaults = {"aux_loss_enabled": False, "accelerator": ACCELERATOR, "beta": 0.3, "use_weighting": False}
    defaults |= {"_metrics": collections.defaultdict(lambda: collections.defaultdict(list)), "_tp_size": 1}
    defaults |= {"model": torch.nn.Linear(1, 1), "precompute_ref_logps": True, "_total_train_tokens": 0}
    for name, value in {**defaults, **fields}.items():
        object.__setattr__(made, name, value)
    return made


def draw(seed=0):
    """`(log-probabilities of tokens [2B, T - 1], masks of completions [2B, T], reference [2B])`; chosen rows first."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) >= 3) & (np.arange(TOKENS) < rng.integers(5, TOKENS + 1, (2 * B, 1)))
    tokens = -rng.exponential(1.0, (2 * B, TOKENS - 1)) * mask[:, 1:]
    reference = tokens.sum(1) + rng.normal(0, 2, 2 * B)
    return tokens.astype(np.float32), mask, reference.astype(np.float32)


def pairs():
    tokens, mask, reference = draw()
    policy, lengths = tokens.sum(1), mask.sum(1).astype(np.float32)
    halves = [x[half] for x in (policy, reference, lengths) for half in (slice(0, B), slice(B, None))]
    return Pairs(*(jnp.asarray(x) for x in halves))


@pytest.mark.parametrize("name", OURS_AND_THEIRS)
def test_a_loss_of_pairs_and_its_metrics_are_those_of_trl(name):
    options, theirs, settings = OURS_AND_THEIRS[name]
    tokens, mask, reference = draw()
    fields = {"loss_types": [theirs], "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    dpo = trainer(DPOTrainer, **fields, **{"label_smoothing": 0.0, **settings})
    chosen, rejected = torch.from_numpy(reference).chunk(2)
    whole = torch.from_numpy(mask).long()
    inputs = {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    expected = dpo._compute_loss(lambda **_: outputs(torch.from_numpy(tokens)), inputs, return_outputs=False)

    loss = LOSSES[name](beta=0.3, **options)
    assert_close(jnp.mean(loss.loss(pairs())), float(expected), relative=SAME)
    rewards, metrics = loss.rewards(pairs()), dpo._metrics["train"]
    assert_close([float(jnp.mean(r)) for r in rewards], [metrics[f"rewards/{k}"][0] for k in ("chosen", "rejected")])
    assert_close(float(jnp.mean(rewards[0] > rewards[1])), metrics["rewards/accuracies"][0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_without_a_reference_are_those_of_trl(smoothing):
    p = pairs()
    sums = [torch.from_numpy(np.array(x)) for x in (p.chosen, p.rejected)]
    means = [torch.from_numpy(np.array(x)) for x in (p.means.chosen, p.means.rejected)]
    cpo = trainer(CPOTrainer, alpha=0.0, loss_type="sigmoid", label_smoothing=smoothing)
    smooth = LOSSES["dpo"](beta=0.3, label_smoothing=smoothing).loss(p.alone)
    assert_close(smooth, cpo.cpo_loss(*sums)[0].numpy(), relative=SAME)
    if smoothing:
        return
    assert_close(LOSSES["cpo"](beta=0.3, alpha=0.0).loss(p), cpo.cpo_loss(*sums)[0].numpy(), relative=SAME)
    simpo = trainer(CPOTrainer, alpha=0.0, loss_type="simpo", label_smoothing=0.0, simpo_gamma=0.5, beta=2.0)
    loss = LOSSES["simpo"](beta=2.0, gamma_ratio=0.25).loss(p)  # theirs is gamma, ours gamma / beta
    assert_close(loss, simpo.cpo_loss(*means)[0].numpy(), relative=SAME)
    odds = trainer(ORPOTrainer).odds_ratio_loss(*means)[0].numpy()
    assert_close(LOSSES["orpo"](beta=0.3).loss(p) + p.means.chosen, -odds, relative=SAME)


def test_kto_and_its_point_are_those_of_trl():
    tokens, mask, reference = (x[:B] for x in draw())
    other, _, other_reference = (x[:B] for x in draw(seed=1))
    label = np.array([True, True, False, True, False, False])
    point = kto_reference_point(jnp.asarray(other.sum(1) - other_reference), jnp.ones(B))
    losses = kto_loss(jnp.asarray(tokens.sum(1) - reference), jnp.asarray(label), point, 0.3, 1.5, 0.5)

    fields = {"calculate_KL": True, "loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5}
    kto = trainer(KTOTrainer, **fields)
    whole = torch.from_numpy(mask).long()
    inputs = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), whole)
    inputs |= {f"KL_{name}": x for name, x in inputs.items()}
    inputs |= {"ref_logps": torch.from_numpy(reference), "ref_KL_logps": torch.from_numpy(other_reference)}
    inputs |= {"label": torch.from_numpy(label)}
    found = iter([outputs(torch.from_numpy(other)), outputs(torch.from_numpy(tokens))])
    expected = kto._compute_loss(lambda **_: next(found), inputs, return_outputs=False)
    assert_close(jnp.mean(losses), float(expected), relative=SAME)
    assert_close(point, kto._metrics["train"]["kl"][0], relative=SAME)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_the_loss_of_rewards_is_that_of_trl(margin):
    rewards = np.random.default_rng(0).normal(size=2 * B).astype(np.float32)
    args = types.SimpleNamespace(center_rewards_coefficient=0.01)
    inputs = {"attention_mask": torch.ones(2 * B, 3)} | ({} if margin is None else {"margin": torch.full((B,), margin)})
    model = lambda **_: types.SimpleNamespace(logits=torch.from_numpy(rewards)[:, None])  # noqa: E731
    expected = trainer(RewardTrainer, args=args).compute_loss(model, inputs)
    losses = reward_loss(jnp.asarray(rewards[:B]), jnp.asarray(rewards[B:]), margin or 0.0, 0.01)
    assert_close(jnp.mean(losses), float(expected), relative=SAME)
