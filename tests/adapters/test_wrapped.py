"""Adapters as other versions of peft and other models name and store them: wrapped language models, swapped experts."""

import json

import jax
import numpy as np
import pytest

from lowrank import pretrained
from lowrank.adapters import peft
from lowrank.core import weight
from lowrank.core.errors import UserError
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import LLAMA
from tests.support.close import assert_close

merge = jax.jit(weight.merge)
PRE = "base_model.model."


def written(folder, tensors, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}))
    tensors = {k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}
    files.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora(path, n_in, n_out, rank=2, seed=0):
    rng, shapes = np.random.default_rng(seed), {"A": (rank, n_in), "B": (n_out, rank)}
    return {f"{PRE}{path}.lora_{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}


LAYERS = {"today": "model.language_model.layers", "before 5": "language_model.model.layers", "plain": "model.layers"}
REGEX = (
    r"(?:.*?(?:language|text).*?(?:self_attn).*?(?:q_proj|v_proj))|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.(?:q_proj|v_proj))"
)
CONFIGS = {
    "a list": {"target_modules": ["q_proj", "v_proj"]},
    "a regex": {"target_modules": REGEX},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"LAYERS.1.self_attn.q_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained.load(str(files.directory(tmp_path_factory.mktemp("hf") / "tiny", LLAMA)))


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_of_a_wrapped_language_model_is_that_of_the_language_model(base, tmp_path, case):
    found = {}
    for name, layers in LAYERS.items():
        config = json.loads(json.dumps(CONFIGS[case]).replace("LAYERS", layers.replace(".", "\\\\.")))
        rank = 3 if case == "patterns" else 2
        tensors = {}
        for i in range(3):
            tensors |= lora(f"{layers}.{i}.self_attn.q_proj", 16, 16, rank if i == 1 else 2, i)
            tensors |= lora(f"{layers}.{i}.self_attn.v_proj", 16, 8, seed=i)
        if name == "today":  # peft adapts an encoder of images by the same list; it is left out
            tensors |= lora("model.vision_tower.encoder.layers.0.self_attn.q_proj", 6, 6)
        found[name] = merge(peft.load(written(tmp_path / name, tensors, **config), base.params, base, any_base=True))
    for name in ("today", "before 5"):
        jax.tree.map(np.testing.assert_array_equal, found[name], found["plain"])
    assert not np.array_equal(
        found["plain"]["layers"]["attn"]["q"]["kernel"], base.params["layers"]["attn"]["q"]["kernel"]
    )


def test_a_module_that_a_wrapped_adapter_lacks_is_named(base, tmp_path):
    tensors = lora("model.language_model.layers.0.self_attn.q_proj", 16, 16)
    folder = written(tmp_path / "a", tensors, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing"):
        peft.load(folder, base.params, base, any_base=True)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_experts_of_peft_before_019_are_read_by_its_formula(tmp_path, version, square):
    """Before 0.19, `delta[e, i, o] = s sum_r B[o, r, e] A[e, r, i]` for all parameters `[E, i, o]`."""
    E, D, r, hidden, old = 3, 16, 2, 16 if square else 24, version == "0.18.1"
    spec = {**LLAMA, "model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2}
    spec |= {"intermediate_size": hidden, "num_hidden_layers": 1}
    base = pretrained.load(str(files.directory(tmp_path / "hf", spec)))
    rng, tensors, change = np.random.default_rng(0), {}, {}
    shapes = {"gate_up_proj": (2 * hidden, D), "down_proj": (D, hidden)}
    for name, (out, into) in shapes.items() if not square else [("down_proj", (D, hidden))]:
        n_in, n_out = (out, into) if old else (into, out)
        a, b = rng.normal(size=(E * r, n_in)), rng.normal(size=(n_out, r * E))
        path = f"model.layers.0.mlp.experts{'.base_layer' if name == 'gate_up_proj' else ''}"
        tensors |= {f"{PRE}{path}.lora_A.weight": a, f"{PRE}{path}.lora_B.weight": b}
        order = "ore,eri->eio" if old else "ore,eri->eoi"
        change[name] = 3 * np.einsum(order, b.reshape(n_out, r, E), a.reshape(E, r, n_in))  # [E, out, in]
    config = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in change]}
    folder = written(tmp_path / "a", tensors, peft_version=version, **config)
    found = merge(peft.load(folder, base.params, base, any_base=True))["layers"]["mlp"]["experts"]
    deltas = {"down": change["down_proj"]}
    if not square:
        deltas["gate"], deltas["up"] = np.split(change["gate_up_proj"], 2, axis=1)
    for name, delta in deltas.items():
        kernel = np.asarray(base.params["layers"]["mlp"]["experts"][name]["kernel"][0], np.float64)
        assert_close(found[name]["kernel"][0], kernel + delta.swapaxes(1, 2), name=name)
