"""MaxText's checkpoints are the checkpoints of Hugging Face that MaxText's formulas make them of."""

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.pretrained import describe, load
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import LLAMA
from tests.support.close import assert_close

UNTIED = {**LLAMA, "tie_word_embeddings": False, "head_dim": 6}  # heads that are not D wide together
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MOE = {**UNTIED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
MODELS = {
    "llama": UNTIED,
    "tied": {**LLAMA, "head_dim": 6},
    "llama3.1": {**UNTIED, "rope_scaling": {"rope_type": "llama3", **LLAMA31}},
    "mistral": {**UNTIED, "model_type": "mistral", "sliding_window": None},
    "mixtral": {**UNTIED, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3": {**UNTIED, "model_type": "qwen3"},
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "norm_topk_prob": True},
}
MINE = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
PER_LAYER = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
    "self_attn.q_norm": "self_attention/query_norm",
    "self_attn.k_norm": "self_attention/key_norm",
}
MLP = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
W = {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}


def maxtext_tree(hf, arrays, scanned=True, padding=0):
    """The parameters that MaxText's script writes: all layers are stacked first, then axes change places."""
    L, N, K, H = (hf[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"))
    flat = {
        "token_embedder/embedding": np.pad(arrays["model.embed_tokens.weight"], ((0, padding), (0, 0))),
        "decoder/decoder_norm/scale": arrays["model.norm.weight"],
    }
    if "lm_head.weight" in arrays:
        flat["decoder/logits_dense/kernel"] = np.pad(arrays["lm_head.weight"].T, ((0, 0), (0, padding)))

    def every(name):
        return np.stack([arrays[f"model.layers.{i}.{name}.weight"] for i in range(L)])

    layers = {}
    for theirs, name in MINE.items():
        x = every(f"self_attn.{name}").transpose(0, 2, 1)
        x = x.reshape(L, x.shape[1], N if theirs == "query" else K, H)
        if "rope_scaling" in hf and theirs != "value":
            halves, x = np.split(x, 2, axis=-1), np.empty_like(x)
            x[..., ::2], x[..., 1::2] = halves
        if theirs == "query" and not hf["model_type"].startswith("qwen3"):
            x = (x / np.sqrt(H)).astype(np.float32)
        layers[f"self_attention/{theirs}/kernel"] = x.transpose(1, 0, 2, 3)
    out = every("self_attn.o_proj")
    layers["self_attention/out/kernel"] = out.reshape(L, out.shape[1], N, H).transpose(2, 0, 3, 1)
    for name, theirs in PER_LAYER.items():
        if f"model.layers.0.{name}.weight" in arrays:
            layers[f"{theirs}/scale"] = every(name).T
    if hf["model_type"] == "mixtral":
        layers |= moe("MoeBlock_0", every, W, "block_sparse_moe.gate", "block_sparse_moe.experts")
    elif hf["model_type"] == "qwen3_moe":
        layers |= moe("moe_block", every, MLP, "mlp.gate", "mlp.experts")
    else:
        layers |= {f"mlp/{theirs}/kernel": every(f"mlp.{n}").transpose(2, 0, 1) for n, theirs in MLP.items()}
    if scanned:
        flat |= {f"decoder/layers/{name}": x for name, x in layers.items()}
    else:
        flat |= {f"decoder/layers_{i}/{name}": x.take(i, axis=1) for name, x in layers.items() for i in range(L)}
    return traverse_util.unflatten_dict(
        {f"params/{name}": np.ascontiguousarray(x) for name, x in flat.items()}, sep="/"
    )


def moe(block, every, names, gate, experts):
    held = {
        f"{block}/{t}": np.stack([every(f"{experts}.{e}.{n}").swapaxes(1, 2) for e in range(3)])
        for n, t in names.items()
    }
    return {**held, f"{block}/gate/kernel": every(gate).transpose(2, 0, 1)}


def written(folder, hf, params, place=""):
    files.write_directory(folder, hf, {})
    (folder / "model.safetensors").unlink()
    ocp.PyTreeCheckpointer().save(folder / place if place else folder / "0", params)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_maxtext_is_the_checkpoint_of_hugging_face(tmp_path, name):
    hf = MODELS[name]
    arrays = files.tensors(hf)
    plain = load(str(files.write_directory(tmp_path / "hf", hf, arrays)))
    params = maxtext_tree(hf, arrays, scanned=name not in ("tied", "qwen3"), padding=3)
    train = {"params": params, "opt_state": {"mu": params}, "step": np.zeros((), np.int32)}
    place, whole = ("0/items", train) if name == "llama" else ("", {"params": params})
    read = load(str(written(tmp_path / "maxtext", hf, whole, place)))
    assert (read.family, read.config) == (hf["model_type"], plain.config)
    for (leaf, x), (_, y) in zip(tree.named_leaves(read.params), tree.named_leaves(plain.params), strict=True):
        assert_close(x, y, name=leaf, relative=1e-6)


def test_what_cannot_be_read_is_said(tmp_path):
    arrays = files.tensors(LLAMA)
    params = {"params": maxtext_tree({**LLAMA, "head_dim": 4}, arrays)}
    folder = written(tmp_path / "other", {**LLAMA, "model_type": "olmo2"}, params)
    with pytest.raises(UserError, match=r"model type of a checkpoint of MaxText 'olmo2'.*llama"):
        describe(str(folder))
    folder = written(tmp_path / "deeper", {**LLAMA, "num_hidden_layers": 5}, params)
    with pytest.raises(UserError, match=r"layers\.3\..* is missing"):
        load(str(folder))
    folder = written(tmp_path / "bare", LLAMA, params)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"a checkpoint of MaxText, which holds no config: put the config\.json"):
        describe(str(folder))
    params["params"]["params"]["decoder"]["layers"]["mlp"]["wi_2"] = {"kernel": np.zeros((2, 3, 2), np.float32)}
    with pytest.raises(UserError, match=r"'params/params/decoder/layers/mlp/wi_2/kernel' .* has no place"):
        describe(str(written(tmp_path / "more", LLAMA, params)))
