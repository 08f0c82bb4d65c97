"""AdaLoRA to `peft` and back, with what the rank allocator pruned left out."""

import copy
import json

import jax
import numpy as np
import peft
import pytest
import torch

from lowrank.adapters import peft as peft_format
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference
from tests.support.parity_bases import (
    ATTN,
    GPT2_TARGETS,
    QKVO,
    assert_same_weights,
    make,
    our_logits,
    randomize,
    their_logits,
)

# peft warns of the pattern that it wrote itself: lora_E is no module
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
RANK, ALPHA = 6, 10
GROUP = {"name": "adalora", "init_rank": RANK, "target_rank": 2, "alpha": float(ALPHA)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`{name: (transformers model, our base, our parameters)}`."""
    return make(lambda: tmp_path_factory.mktemp("base"), ["llama", "gpt2"])


def pruned(params):
    """The parameters with some triplets pruned, and all of the middle layer's of v."""

    def some(w):
        kept = np.random.default_rng(w.shape[-1]).random(w.e.shape) < 0.6
        kept[1] &= w.shape[-1] >= 32  # not the narrower k and v of the Llama
        return w.__class__(**{**vars(w), "e": w.e * kept})

    return jax.tree.map(lambda w: some(w) if is_weight(w) else w, params, is_leaf=is_weight)


@pytest.mark.parametrize(("name", "target"), [("llama", ATTN), ("gpt2", GPT2_TARGETS)])
def test_peft_loads_our_pruned_adapter_and_computes_our_logits(name, target, bases, tmp_path):
    model, base, plain = bases[name]
    params, trained = adapted(plain, {**GROUP, "target": target})
    params = pruned(params)
    peft_format.save(params, base, tmp_path, trained=trained, method=GROUP, original=plain)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), theirs) > 0.02
    assert_close(our_logits(base, params), theirs, relative=2e-5)
    back = peft_format.load(tmp_path, plain, base)
    assert_same_weights(params, back)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["init_r"], said["target_r"] >= 1, said["peft_type"]) == (RANK, True, "ADALORA")
    assert len(said["rank_pattern"]) == (10 if name == "llama" else 6)  # two modules of the Llama were pruned away


def theirs_pruned(model):
    """A model of peft as its allocator leaves it: E zero where pruned, and the pattern in the config."""
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=ALPHA, target_modules=QKVO, total_step=10, tinit=1, tfinal=2
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5, size=0.7)
    rng, pattern = np.random.default_rng(0), {}
    for name, p in theirs.base_model.model.named_parameters():
        if "lora_E" in name:
            kept = rng.random(RANK) < 0.6
            kept[0] = True
            pattern[name] = kept.tolist()
            p.data *= torch.tensor(kept[:, None])
    theirs.peft_config["default"].rank_pattern = pattern
    return theirs


def test_we_load_a_pruned_adapter_of_peft_and_compute_its_logits(bases, tmp_path):
    model, base, plain = bases["llama"]
    theirs = theirs_pruned(model)
    expected = their_logits(theirs)
    theirs.save_pretrained(tmp_path)
    mine = peft_format.load(tmp_path, plain, base)
    assert difference(their_logits(model), expected) > 0.02
    assert_close(our_logits(base, mine), expected, relative=2e-5)
    again = peft_format.save(mine, base, tmp_path / "again")
    assert_same_weights(mine, peft_format.load(again, plain, base))
    assert json.loads((again / "adapter_config.json").read_text())["lora_alpha"] == ALPHA
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_r": RANK + 1}))
    with pytest.raises(UserError, match=r"rank_pattern for .* must be a list of 7 bools"):
        peft_format.load(tmp_path, plain, base)
