"""An adapter of peft that is trained further beside peft's own `from_pretrained(..., is_trainable=True)`."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from lowrank.core import tree
from lowrank.training import build, step
from tests.support.close import assert_close
from tests.support.parity_bases import randomize
from tests.support.tiny_runs import config_of

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries to each other
SAME, STEPS, RATE = 1e-5, 3, 0.5
PLAIN = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5.0}
CASES = {
    "by layer": {**PLAIN, "rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 7.0}},
    "some layers": {**PLAIN, "layers_to_transform": [0, 2], "use_rslora": True},
    "dora": {**PLAIN, "use_dora": True, "bias": "lora_only"},
    "pissa": {**PLAIN, "init_lora_weights": "pissa"},
    "olora": {**PLAIN, "init_lora_weights": "olora"},
    "head": {**PLAIN, "modules_to_save": ["lm_head"]},
}


def base(files):
    return transformers.AutoModelForCausalLM.from_pretrained(files / "llama", attn_implementation="eager").eval()


def saved(files, options, folder):
    """An adapter as a training left it."""
    model = peft.get_peft_model(base(files), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(options.get("init_lora_weights"), str):
        with torch.no_grad():
            for _, p in learned:
                p.mul_(1.1)
    else:
        randomize(learned, seed=1, size=0.5)
    model.save_pretrained(folder)


def theirs(files, folder, batches):
    """`(losses, tensors by name)` of SGD on the mean loss of the learned tokens."""
    model = peft.PeftModel.from_pretrained(base(files), folder, is_trainable=True).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    losses = []
    for batch in batches:
        ids, targets, weights = (torch.tensor(np.asarray(batch[name])) for name in ("tokens", "targets", "weights"))
        logits = model(input_ids=ids.long(), attention_mask=torch.tensor(np.asarray(batch["segments"]) > 0)).logits
        logps = torch.log_softmax(logits, -1).gather(-1, targets.long()[..., None])[..., 0]
        loss = -(logps * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {k: v.numpy() for k, v in peft.get_peft_model_state_dict(model).items()}


def ours(files, folder, batches):
    """`(losses, the adapted parameters)` of the same steps; fills `batches` with those that it took."""
    changes = {"model__adapter": str(folder), "mesh__data": 1, "steps": STEPS, "data__prompt_loss_weight": 0.5}
    changes |= {"data__packing": False}
    config = config_of(files, "method=adapter", **changes, optim={"name": "sgd", "clip": 0.0})
    run = build.build_run(config)
    optimizer, losses = run.optimizer(), []
    state, frozen, _ = run.start(run.load().params, optimizer)
    for _ in range(STEPS):
        batch = run.put(next(run.loader))
        batches.append(jax.device_get(batch))
        program = step.compile_step(run.step(optimizer), state, frozen, batch)
        state, metrics = program(state, frozen, batch, np.float32(RATE))
        losses.append(float(metrics["loss"]))
    return losses, tree.join(state.trained, frozen)


@pytest.mark.parametrize("name", CASES)
def test_steps_from_an_adapter_are_those_of_peft(name, files, tmp_path):
    saved(files, CASES[name], tmp_path)
    batches = []
    losses, params = ours(files, tmp_path, batches)
    their_losses, tensors = theirs(files, tmp_path, batches)
    assert_close(losses, their_losses, relative=SAME)
    checked = 0
    for i in (0, 2):
        for module in "qv":
            form = params["layers"]["attn"][module]["kernel"]
            for field, part in (("a", "lora_A"), ("b", "lora_B")):
                theirs_T = tensors[f"base_model.model.model.layers.{i}.self_attn.{module}_proj.{part}.weight"].T
                assert_close(np.asarray(getattr(form, field))[i], theirs_T, relative=SAME)
                checked += 1
    assert checked == 8
