"""transformers loads a merged checkpoint and computes what the live model did; peft merges to the same tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from lowrank import pretrained
from lowrank.adapters import export
from lowrank.adapters import peft as peft_format
from lowrank.models import build_model
from lowrank.models.context import STRETCHES
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TOKENS = np.arange(5, 17, dtype=np.int32)[None]
ATTN = r".*attn/(q|k|v|o)/kernel"
GROUPS = {
    "lora": {"name": "lora", "rank": 3, "alpha": 10.0, "target": ATTN, "rank_pattern": {r"layers/1/.*": 1}},
    "dora": {"name": "dora", "rank": 3, "target": ATTN},
    "ia3": {"name": "ia3"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("hf") / "tiny-llama")


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("name", GROUPS)
def test_transformers_loads_a_merged_checkpoint_and_computes_the_live_logits(folder, name, tmp_path):
    base = pretrained.load(str(folder))
    params = adapted(base.params, GROUPS[name])[0]
    export.merge_to_hf(params, base, tmp_path / "merged")
    live = build_model(base.config).apply({"params": params}, TOKENS)
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert_close(theirs, live, relative=2e-4)
    assert difference(live, build_model(base.config).apply({"params": base.params}, TOKENS)) > 0.02


WAYS = {name: {"rope": name} for name in STRETCHES}
WAYS["abf"] |= {"context_theta": 5e5}


@pytest.mark.parametrize("way", WAYS)
def test_transformers_loads_an_extended_context_and_computes_the_live_logits(folder, way, tmp_path):
    positions = pretrained.describe(str(folder))[0].max_positions
    base = pretrained.load(str(folder), model={**WAYS[way], "context": 4 * positions})
    export.merge_to_hf(base.params, base, tmp_path / "merged")
    tokens = np.arange(2 * positions, dtype=np.int32)[None] % base.config.vocab_size
    live = build_model(base.config).apply({"params": base.params}, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert_close(theirs, live, relative=2e-4)
    plain = pretrained.load(str(folder), model={"max_positions": 4 * positions})
    assert difference(live, build_model(plain.config).apply({"params": base.params}, tokens)) > 0.02


@pytest.mark.parametrize("name", GROUPS)
def test_peft_merges_our_adapter_into_the_same_tensors(folder, name, tmp_path):
    base = pretrained.load(str(folder))
    params = adapted(base.params, GROUPS[name])[0]
    peft_format.save(params, base, tmp_path / "adapter")
    export.merge_to_hf(params, base, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(_plain(folder), tmp_path / "adapter").merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert_close(tensor, theirs[key], name=key)


def _plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_checkpoint_in_bfloat16_holds_what_was_reported(folder, tmp_path):
    base = pretrained.load(str(folder), param_dtype="bfloat16")
    params = adapted(base.params, GROUPS["lora"])[0]
    report = export.merge_to_hf(params, base, tmp_path / "merged", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    lost = size = 0.0
    for i in range(3):
        for name in "qkvo":
            w = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), params["layers"]["attn"][name]["kernel"])
            stored = model.model.layers[i].self_attn.get_submodule(f"{name}_proj").weight
            update = w.scale * w.a @ w.b
            lost += np.sum((stored.detach().double().numpy().T - w.base - update) ** 2)
            size += np.sum(update**2)
    assert stored.dtype == torch.bfloat16
    assert_close(report.error, (lost / size) ** 0.5)
    print(report)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), export.merged(params, "bfloat16")[0])
    assert_close(logits(model.float()), build_model(base.config).apply({"params": rounded}, TOKENS), relative=2e-4)
