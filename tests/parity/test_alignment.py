"""Orders of heads and units that change no function in transformers, family by family, and are found again."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from lowrank.merging.alignment.align import Moves, add_layer, find_moves
from lowrank.merging.alignment.layers import Model
from lowrank.merging.alignment.matching import HeadOrder
from lowrank.merging.alignment.options import Options
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.combine import combine
from lowrank.merging.model_spec import ModelSpec
from tests.support.close import assert_close
from tests.support.merged_models import recipe
from tests.support.parity_bases import GPT2, LLAMA, ROBERTA, TOKENS, randomize

PLAIN = {k: v for k, v in LLAMA.items() if k != "attention_bias"}
FAMILIES = {  # fused kernels, norms of each head and of all heads, no rope
    "gpt2": GPT2,
    "phi3": PLAIN | {"pad_token_id": 0},
    "qwen3": PLAIN | {"head_dim": 8},
    "olmo2": PLAIN,
    "roberta": ROBERTA | {"pad_token_id": 1},
    "modernbert": ROBERTA | {"pad_token_id": 0},
}


def model_of(folder, family):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    encoder = "bert" in family
    auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    randomize(model.named_parameters(), seed=0)
    model.save_pretrained(folder)
    return auto


def logits(auto, folder):
    with torch.no_grad():
        return auto.from_pretrained(folder, attn_implementation="eager").eval()(torch.tensor(TOKENS)).logits.numpy()


def shuffled(checkpoint, rng):
    """Random moves of a checkpoint that change no function."""
    model, moves = Model(checkpoint), Moves()
    K, G, d = model.groups, model.heads // model.groups, model.head_dim
    for layer in range(model.depth):
        heads, values, keys = (np.array([rng.permutation(n) for _ in range(K)]) for n in (G, d, d))
        keys = keys if model.free_keys(layer) else np.tile(np.arange(d), (K, 1))
        groups, units = rng.permutation(K), rng.permutation(model.units)
        add_layer(moves, model, layer, HeadOrder(groups, heads, values, keys), units, units)
    return moves


@pytest.mark.parametrize("family", FAMILIES)
def test_an_order_changes_no_function_and_is_found_again(family, tmp_path):
    auto = model_of(tmp_path / "a", family)
    a = Checkpoint(ModelSpec(str(tmp_path / "a")))
    moves = shuffled(a, np.random.default_rng(0))
    auto.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    moved = {name: moves.apply(name, a.read(name)) for name in a.tensors}
    assert sum(not np.array_equal(x, a.read(name)) for name, x in moved.items()) >= 3 * 4
    save_file(moved, tmp_path / "b/model.safetensors", {"format": "pt"})
    before = logits(auto, tmp_path / "a")
    assert_close(logits(auto, tmp_path / "b"), before, relative=1e-5, size=float(np.abs(before).max()))
    b = Checkpoint(ModelSpec(str(tmp_path / "b")))
    found = find_moves(a, b, Options())
    for name in a.tensors:
        np.testing.assert_array_equal(found.apply(name, b.read(name)), a.read(name), err_msg=name)
    models = {name: tmp_path / name for name in "ab"}
    keys = {"merge_method": "uniform_soup", "models": [{"model": name} for name in models], "align": {}}
    combine(recipe(models, **keys), tmp_path / "m")
    _, info = auto.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(logits(auto, tmp_path / "m"), before, relative=1e-5, size=float(np.abs(before).max()))
