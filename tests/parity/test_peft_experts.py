"""LoRA on fused experts, in and out of PEFT's format, on tiny mixtures of experts."""

import copy
import dataclasses
import json
import tempfile
import types

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lowrank import pretrained
from lowrank.adapters import export
from lowrank.adapters import peft as peft_format
from lowrank.core.errors import UserError
from lowrank.models import build_model
from lowrank.pretrained.families import FAMILIES
from tests.support.adapted_model import adapted
from tests.support.checkpoint_files import VOCAB, tensors, write_directory
from tests.support.close import assert_close, difference
from tests.support.parity_bases import LLAMA, TOKENS, assert_same_weights, our_logits, randomize, their_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # It looks for the keys among modules, and obeys them on parameters all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
SPECS = {
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "tied mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in SPECS}


def make(name, folder):
    spec, name = SPECS[name], name.removeprefix("tied ")
    config = transformers.AutoConfig.for_model(name, **spec)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model.named_parameters(), seed=0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "experts" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * p.shape[-1] ** -0.5)
    model.name_or_path = str(folder)
    model.config.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as disk:
        model.save_pretrained(disk)
        state = load_file(f"{disk}/model.safetensors")
    ours = dataclasses.replace(FAMILIES[name].config(model.config.to_dict()), remat="none")
    params = {}
    for tensor in FAMILIES[name].tensors(ours):
        arrays = [state[n].T if tensor.transpose else state[n] for n in tensor.names]
        *path, last = tensor.leaf.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jax.numpy.asarray(np.reshape(arrays, tensor.stack + arrays[0].shape))
    return model, types.SimpleNamespace(config=ours, family=name, name=str(folder), new=()), params


ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM"}
EXPERTS = r"layers/mlp/experts/(gate|up|down)/kernel"
OURS = {
    "all": ("mixtral", {"rank": 2, "alpha": 5.0, "target": EXPERTS}),
    "down": ("olmoe", {"rank": 3, "alpha": 5.0, "target": r"layers/mlp/experts/down/kernel"}),
    "up alone": ("olmoe", {"rank": 2, "alpha": 5.0, "target": r"layers/mlp/experts/up/kernel"}),
    "by layer, rslora": (
        "olmoe",
        {"rank": 3, "alpha": 5.0, "rslora": True, "target": EXPERTS, "rank_pattern": {r"layers/1/.*": 1}},
    ),
    "with attention": ("mixtral", {"rank": 2, "alpha": 5.0, "target": rf"{EXPERTS}|.*attn/(q|v)/kernel"}),
    "with a tied embedding": ("tied mixtral", {"rank": 2, "alpha": 5.0, "target": rf"{EXPERTS}|embed/embedding"}),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_our_experts_and_computes_our_logits(case, bases, tmp_path):
    name, group = OURS[case]
    model, base, plain = bases[name]
    group = {"name": "lora", **group}
    params, trained = adapted(plain, group)
    peft_format.save(params, base, tmp_path, trained=trained, method=group, original=plain)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), theirs) > 0.01
    assert_close(our_logits(base, params), theirs, relative=5e-5)
    again = peft_format.load(tmp_path, plain, base)
    assert_same_weights(params, again)


THEIRS = {
    "both": ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "gate and up": ("olmoe", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "one layer": ("olmoe", {"target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "with attention": ("olmoe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "with a tied embedding": (
        "tied mixtral",
        {"target_modules": ["embed_tokens"], "target_parameters": ["experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_experts_of_peft_and_compute_its_logits(case, bases, tmp_path):
    name, options = THEIRS[case]
    model, base, plain = bases[name]
    config = peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": [], **options})
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5, size=0.7)
    theirs.save_pretrained(tmp_path)
    mine = peft_format.load(tmp_path, plain, base)
    expected = their_logits(theirs)
    assert difference(their_logits(model), expected) > 0.01
    config = dataclasses.replace(base.config, tied="head" not in mine)
    assert_close(our_logits(types.SimpleNamespace(config=config), mine), expected, relative=2e-5)
    again = peft_format.save(mine, base, tmp_path / "again")
    assert_same_weights(mine, peft_format.load(again, plain, base))


def test_a_parameter_that_is_no_expert_is_named(bases, tmp_path):
    _, base, plain = bases["olmoe"]
    params, _ = adapted(plain, {"name": "lora", "rank": 2, "target": EXPERTS})
    peft_format.save(params, base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.down_prj"))
    with pytest.raises(UserError, match=r"unknown parameter in target_parameters: '.*down_prj' \(did you mean"):
        peft_format.load(tmp_path, plain, base)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_loads_the_merged_experts_and_computes_the_live_logits(name, tmp_path):
    spec = {"model_type": name, **SPECS[name], "vocab_size": VOCAB, "architectures": [ARCHITECTURES[name]]}
    folder = write_directory(tmp_path / "base", spec, tensors(spec))
    base = pretrained.load(str(folder))
    params = adapted(base.params, {"name": "lora", "rank": 2, "alpha": 5.0, "target": EXPERTS})[0]
    export.merge_to_hf(params, base, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = TOKENS % VOCAB
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    live = build_model(base.config).apply({"params": params}, ids)
    assert_close(live, expected, relative=5e-5)


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w2", "q_proj"]])
def test_we_load_single_experts_as_peft_does(bases, tmp_path, targets):
    model, base, plain = bases["mixtral"]
    rng, arrays, width = np.random.default_rng(3), {}, LLAMA["intermediate_size"]
    expert, attention = "model.layers.{}.block_sparse_moe.experts.{}.{}", "model.layers.{}.self_attn.{}"
    paths = {
        (expert if target[0] == "w" else attention).format(i, *([e] if target[0] == "w" else []), target): target
        for target in targets
        for i in range(3)
        for e in range(4)
    }
    for path, target in paths.items():
        n_in, n_out = {"w2": (width, 32), "q_proj": (32, 32)}.get(target, (32, width))
        for factor, shape in {"A": (2, n_in), "B": (n_out, 2)}.items():
            arrays[f"base_model.model.{path}.lora_{factor}.weight"] = rng.normal(size=shape).astype(np.float32) * 0.3
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base.name}))
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    expected = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), expected) > 0.01
    assert_close(our_logits(base, peft_format.load(tmp_path, plain, base)), expected, relative=5e-5)
