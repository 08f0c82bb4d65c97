"""Results of merges in transformers: they load without a missing tensor, and have our logits (`make parity`)."""

import numpy as np
import pytest
import torch
import transformers

from lowrank import pretrained
from lowrank.merging.combine import combine
from lowrank.models import build_model
from tests.support.close import assert_close
from tests.support.dense_families import ARCHITECTURES, tuned
from tests.support.merged_models import recipe, tensors

TOKENS = np.array([[3, 8, 9, 7, 12, 6, 20]])
EXPERTS = [{"source_model": "a", "positive_prompts": ["the cat sat"]}]
EXPERTS += [{"source_model": "b", "positive_prompts": ["red sun", "who ran ?"]}]
MIXTURE = {"base_model": "base", "gate_mode": "hidden", "experts": EXPERTS}
STACKED = [
    {"merge_method": "linear", "sources": [{"model": n, "layer_range": [0, 2]} for n in "ab"]},
    {"sources": [{"model": "b", "layer_range": [1, 3]}]},
]
RECIPES = {f"a mixture of {family}": (family, MIXTURE) for family in ARCHITECTURES} | {
    "a mixture with a shared expert": ("qwen2", MIXTURE | {"shared_experts": EXPERTS[:1]}),
    "a mean": ("llama", {"merge_method": "uniform_soup", "models": [{"model": "a"}, {"model": "b"}]}),
    "a hybrid": ("qwen3", {"merge_method": "passthrough", "slices": STACKED, "parameters": {"weight": 1.0}}),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_merge_has_the_same_logits_in_transformers(case, tmp_path):
    family, keys = RECIPES[case]
    combine(recipe(tuned(tmp_path, family), **keys), tmp_path / "m")
    ours = pretrained.load(str(tmp_path / "m"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    found = np.asarray(build_model(ours.config).apply({"params": ours.params}, TOKENS))
    assert_close(found, expected, relative=1e-5, size=float(np.abs(expected).max()))


def test_a_router_points_along_the_hidden_states_of_its_prompts(tmp_path):
    models = tuned(tmp_path, "llama")
    combine(recipe(models, **MIXTURE), tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(models["base"])
    encode = pretrained.load(str(models["base"])).tokenizer.encode
    rows = []
    for expert in EXPERTS:
        states = []
        for prompt in expert["positive_prompts"]:
            with torch.no_grad():
                out = theirs(torch.tensor([encode(prompt)]), output_hidden_states=True)
            states.append([h[0, -1].numpy() for h in out.hidden_states[:-1]])
        rows.append(np.mean(np.float64(states), 0))
    expected = np.moveaxis(rows, 0, 1)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    for layer, x in enumerate(expected):
        found = tensors(tmp_path / "m")[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert_close(found, x, relative=1e-5, size=1)
