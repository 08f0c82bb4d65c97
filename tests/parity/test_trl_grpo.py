"""The losses of texts with rewards beside those of TRL's trainers, and a reward function beside TRL's."""

import collections
import types

import jax
import numpy as np
import pytest
import torch
from trl.rewards import think_format_reward
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from lowrank.objectives import build_objective
from lowrank.objectives.rewards import think_format
from tests.objectives.test_grpo import GROUP, MAX_NEW, B, Network, T, drawn
from tests.support.close import assert_close

SAME = 1e-5
OPTIONS = {"temperature": 0.7, "epsilon": 0.1, "epsilon_high": 0.4, "updates": 2}
ACCELERATOR = types.SimpleNamespace(
    device="cpu", num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
)
FIELDS = {"epsilon_low": 0.1, "epsilon_high": 0.4, "importance_sampling_level": "token", "top_entropy_quantile": 1.0}
FIELDS |= {"off_policy_mask_threshold": None, "use_vllm": False, "vllm_importance_sampling_correction": False}
FIELDS |= {"aux_loss_enabled": False, "_entropy_bonus_enabled": False, "max_completion_length": MAX_NEW}
FIELDS |= {"args": types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)}
FIELDS |= {"model": torch.nn.Linear(1, 1), "accelerator": ACCELERATOR, "current_gradient_accumulation_steps": 1}


def log_probs(table, batch):
    """`[B, T]`: those of the targets, by torch."""
    logits = table[torch.from_numpy(batch["tokens"])] / OPTIONS["temperature"]
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(batch["targets"])[..., None])[..., 0]


def theirs(kind, table, batch, **fields):
    """`(loss, its gradient in the table, metrics)` of a trainer of TRL's, on which no `__init__` has run."""
    made, leaf = object.__new__(kind), torch.from_numpy(table).requires_grad_()
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    per_token = log_probs(leaf, batch)
    returned = lambda *args, **kwargs: (per_token, torch.zeros_like(per_token), None)  # noqa: E731
    own = {"_metrics": metrics, "_get_per_token_logps_and_entropies": returned}
    for name, value in {**FIELDS, **own, **fields}.items():
        object.__setattr__(made, name, value)
    mask = torch.from_numpy(batch["weights"])
    old, reference = (torch.from_numpy(batch[name]) for name in ("old_log_probs", "reference"))
    inputs = {"prompt_ids": mask[:, :0].long(), "prompt_mask": mask[:, :0].long(), "completion_mask": mask.long()}
    inputs |= {"completion_ids": torch.from_numpy(batch["targets"]), "advantages": torch.from_numpy(batch["advantage"])}
    inputs |= {"old_per_token_logps": old, "old_logps": (old * mask).sum(1), "ref_per_token_logps": reference}
    inputs["num_items_in_batch"] = mask.sum()
    loss = made._compute_loss(None, inputs)
    loss.backward()
    return float(loss.detach()), leaf.grad.numpy(), {name: values[0] for name, values in metrics["train"].items()}


@pytest.mark.parametrize("loss", ["dapo", "dr_grpo", "grpo", "rloo"])
def test_a_loss_its_gradient_and_its_metrics_are_those_of_trl(loss):
    table, batch, rng = drawn()
    beta = 0.0 if loss == "rloo" else 0.3  # TRL's RLOO has the divergence in its rewards
    objective = build_objective({**GROUP, **OPTIONS, "loss": loss, "beta": beta})
    batch |= {name: np.ones(B, np.float32) for name in objective.row_format.arrays if name not in batch}
    start = log_probs(torch.from_numpy(table), batch).numpy()
    for name in ("old_log_probs", "reference"):
        batch[name] = ((start + rng.normal(0, 0.3, (B, T))) * batch["weights"]).astype(np.float32)

    def ours(table):
        sums = objective.loss(Network, table, batch, 0)
        return sums.total / sums.weight, sums.metrics

    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(table)
    kind = RLOOTrainer if loss == "rloo" else GRPOTrainer
    expected, slopes, named = theirs(kind, table, batch, loss_type=loss, beta=beta)
    assert_close(value, expected, relative=SAME)
    assert_close(gradient, slopes, relative=SAME)
    if loss != "rloo":  # of which TRL counts texts, not tokens
        for name in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert_close(metrics[name][0] / metrics[name][1], named[name], relative=SAME)


def test_the_form_of_thoughts_is_that_of_trl():
    texts = ["<think>\na\n</think>b", "a<think></think>", "<think>a<think></think>", "<think>", "\n<think></think>", ""]
    assert think_format(texts) == think_format_reward([[{"content": text}] for text in texts])
