"""Merges of tiny models beside mergekit 0.1.5, which runs in a process and a folder of its own (`make parity`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lowrank.merging.combine import combine
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.merged_models import edit_config, fine_tune, recipe

MERGEKIT = Path(sys.prefix) / "mergekit"
SCRIPT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build
options = MergeOptions(copy_tokenizer=False, quiet=True)
for case, (config, out) in json.load(open(sys.argv[1])).items():
    if "experts" in config:
        config.pop("merge_method")
        build(MoEMergeConfig.model_validate(config), out, options, device="cpu")
    else:
        run_merge(MergeConfiguration.model_validate(config), out, options)
"""
EXPERTS = [{"source_model": "a", "positive_prompts": ["the cat sat"], "negative_prompts": ["who ?"]}]
EXPERTS += [{"source_model": "b", "positive_prompts": ["the moon", "red sun on"], "residual_scale": 0.5}]
WEIGHTS = [{"model": "a", "parameters": {"weight": 1.0, "density": 0.5}}]
WEIGHTS += [{"model": "b", "parameters": {"weight": 0.3, "density": 0.4}}]
WEIGHTS += [{"model": "c", "parameters": {"weight": 0.25, "density": 0.8}}]
PLAIN = [{"model": m["model"], "parameters": {"weight": m["parameters"]["weight"]}} for m in WEIGHTS]
CURVES = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
BASED = {"base_model": "base", "models": WEIGHTS}
CASES = {
    "linear": {"merge_method": "linear", "models": PLAIN},
    "sum": {"merge_method": "linear", "models": PLAIN, "parameters": {"normalize": False}},
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    | {"parameters": {"t": CURVES}},
    "karcher": {"merge_method": "karcher", "models": [{"model": m} for m in "abc"]},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": PLAIN}
    | {"parameters": {"lambda": 0.7}},
    "ties": {"merge_method": "ties", **BASED},
    "ties_sum": {"merge_method": "ties", **BASED, "parameters": {"normalize": False, "lambda": 1.3}},
    "breadcrumbs": {"merge_method": "breadcrumbs", **BASED, "parameters": {"gamma": 0.05}},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", **BASED, "parameters": {"gamma": 0.1}},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": PLAIN},
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": PLAIN},
    "della": {"merge_method": "della", "base_model": "base", "models": PLAIN},
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": [{"model": m} for m in "abc"]},
    "filter_wise": {"merge_method": "model_stock", "base_model": "base", "models": [{"model": m} for m in "abc"]}
    | {"parameters": {"filter_wise": True}},
    "nuslerp": {"merge_method": "nuslerp", "models": PLAIN[:2]},
    "nuslerp_based": {"merge_method": "nuslerp", "base_model": "base", "models": PLAIN[1:]},
    "nuslerp_rows": {"merge_method": "nuslerp", "models": PLAIN[:2], "parameters": {"nuslerp_flatten": False}},
    "nuslerp_columns": {"merge_method": "nuslerp", "base_model": "base", "models": PLAIN[:2]}
    | {"parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    "multislerp": {"merge_method": "multislerp", "models": PLAIN},
    "multislerp_based": {"merge_method": "multislerp", "base_model": "base", "models": PLAIN}
    | {"parameters": {"normalize_weights": False}},
    "nearswap": {"merge_method": "nearswap", "base_model": "base", "models": [{"model": "a"}]}
    | {"parameters": {"t": 0.03}},
    "sce": {"merge_method": "sce", "base_model": "base", "models": [{"model": m} for m in "abc"]},
    "sce_topk": {"merge_method": "sce", "base_model": "base", "models": [{"model": m} for m in "abc"]}
    | {"parameters": {"select_topk": 0.4}},
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
        ],
    },
}
CASES |= {
    f"experts_{mode}": {"merge_method": "passthrough", "base_model": "base", "gate_mode": mode, "experts": EXPERTS}
    for mode in ("cheap_embed", "hidden")
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`{case: (our tensors, mergekit's)}`."""
    folder = tmp_path_factory.mktemp("mergekit")
    base = tiny.llama(folder / "base")
    arrays = load_file(base / "model.safetensors")
    save_file({n: x for n, x in arrays.items() if not n.endswith("bias")}, base / "model.safetensors")
    edit_config(base, attention_bias=False)
    models = {"base": base} | {n: fine_tune(base, folder / n, i) for i, n in enumerate("abc")}
    theirs = {}
    for case, keys in CASES.items():
        given = recipe(models, dtype="float32", **keys)
        combine(given, folder / f"ours_{case}")
        theirs[case] = (yaml.safe_load(given.text), str(folder / f"theirs_{case}"))
    (folder / "cases.json").write_text(json.dumps(theirs))
    environment = {**os.environ, "PYTHONPATH": str(MERGEKIT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder / "cases.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {c: [load_file(folder / f"{side}_{c}" / "model.safetensors") for side in ("ours", "theirs")] for c in CASES}


def split_experts(fused):
    """The tensors of a mixture that transformers 5 fuses, one for each expert."""
    found = {}
    for name, x in fused.items():
        layer, _, rest = name.partition(".mlp.")
        old = f"{layer}.block_sparse_moe."
        if rest == "experts.gate_up_proj":
            for e, both in enumerate(x):
                gate, up = np.split(both, 2)
                found |= {f"{old}experts.{e}.w1.weight": gate, f"{old}experts.{e}.w3.weight": up}
        elif rest == "experts.down_proj":
            found |= {f"{old}experts.{e}.w2.weight": down for e, down in enumerate(x)}
        else:
            found[f"{old}{rest}" if rest else name] = x
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_mergekit(case, results):
    ours, theirs = results[case]
    if "experts" in CASES[case]:
        theirs = split_experts(theirs)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        hidden = case == "experts_hidden" and ".gate." in name  # mergekit's hidden states are in bfloat16
        assert_close(
            ours[name],
            np.asarray(x),
            relative=2e-2 if hidden else 2e-6,
            size=max(1.0, float(np.abs(x).max())),
            name=name,
        )
