"""Whole steps of preference tuning beside TRL's trainers: the same records, LoRA from one file, three steps of SGD."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import transformers
from datasets import Dataset
from safetensors.numpy import load_file
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from lowrank.adapters import peft as peft_format
from lowrank.core import tree
from lowrank.training import build, step
from lowrank.training.reference import StoredReference
from tests.support.close import assert_close, difference
from tests.support.tiny_runs import config_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the interfaces of trl.experimental may change
    from trl.experimental.cpo import CPOConfig, CPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries to each other
SAME = 1e-5  # of a log-probability, which rewards are differences of
SIZE = 1.0
STEPS, RATE, RECORDS = 3, 0.5, 8
KTO = {"name": "kto", "beta": 0.3, "desirable_weight": 3.0, "undesirable_weight": 0.1}
CASES = {  # our objective, TRL's trainer, its config, and the fields of a record
    "dpo": ({"name": "preference", "beta": 0.3}, DPOTrainer, DPOConfig, {"beta": 0.3}),
    "ipo": (
        {"name": "preference", "loss": "ipo", "beta": 0.3},
        DPOTrainer,
        DPOConfig,
        {"beta": 0.3, "loss_type": "ipo"},
    ),
    "copied": ({"name": "preference", "reference": "copied", "beta": 0.3}, DPOTrainer, DPOConfig, {"beta": 0.3}),
    "kto": (KTO, KTOTrainer, KTOConfig, {key: x for key, x in KTO.items() if key != "name"}),
    "simpo": (
        {"name": "preference", "loss": "simpo", "beta": 2.0, "gamma_ratio": 0.25},
        CPOTrainer,
        CPOConfig,
        {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0},
    ),
}


def ours(objective, files, folder):
    """The metrics of each step. The adapter, which does not start at zero, is saved as `before` and `after`."""
    changes = {"data__source": f"jsonl:{files / 'pairs.jsonl'}", "data__max_examples": RECORDS, "data__shuffle": False}
    changes |= {"mesh__data": 1}
    changes |= {"data__batch_size": RECORDS, "steps": STEPS, "optim__name": "sgd", "optim__clip": 0.0}
    config = config_of(files, "rank=2,alpha=4", **changes)
    with config.ignore_type():
        config.objective = objective
    run = build.build_run(config)
    optimizer, base, found = run.optimizer(), run.load(), []
    state, frozen, _ = run.start(base.params, optimizer)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    moved = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), state.trained)
    state = step.init_state(moved, optimizer, run.mesh, copied=run.copied)
    save = lambda name, trained: peft_format.save(tree.join(trained, frozen), base, folder / name)  # noqa: E731
    save("before", moved)
    reference = StoredReference(run)
    reference.fill(tree.join(moved, frozen))
    for _ in range(STEPS):
        batch = run.put(reference.join(next(run.loader)))
        program = step.compile_step(run.step(optimizer), state, frozen, batch)
        state, metrics = program(state, frozen, batch, np.float32(RATE))
        found.append(jax.device_get(metrics))
    save("after", state.trained)
    return found


def theirs(trainer, kind, options, files, folder):
    """The log of each step, and the adapter's tensors after them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(files / "llama", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, folder / "before", is_trainable=True)
    names = ("prompt", "completion", "label") if trainer is KTOTrainer else ("prompt", "chosen", "rejected")
    records = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()][:RECORDS]
    data = Dataset.from_list([{name: record[name] for name in names} for record in records])
    args = kind(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=RECORDS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        max_length=32,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        **options,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "llama")
    made = trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    made.train()
    made.model.save_pretrained(folder / "theirs")
    return [line for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_trl(name, files, tmp_path):
    objective, trainer, kind, options = CASES[name]
    found = ours(objective, files, tmp_path)
    expected = theirs(trainer, kind, options, files, tmp_path)
    for mine, other in zip(found, expected, strict=True):
        shared = [
            key for key in mine if key in other and key.startswith(("loss", "grad_norm", "kl", "rewards", "logps"))
        ]
        if trainer is CPOTrainer:  # whose log-probabilities are means
            shared = [key for key in shared if not key.startswith("logps")]
        assert {"loss", "grad_norm", "rewards/chosen", "rewards/margins"} <= set(shared)
        for key in shared:
            assert_close(mine[key], other[key], relative=SAME, size=SIZE, name=key)
    before, after, trl = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after", "theirs")
    )
    assert after.keys() == trl.keys()
    for key, x in after.items():
        assert difference(x, before[key]) > 1e-3
        assert_close(x, trl[key], relative=1e-4, name=key)
