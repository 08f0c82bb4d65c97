"""Gemma as Kaggle has it, in Orbax, is the checkpoint that Hugging Face has of it."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lowrank.core.errors import UserError
from lowrank.pretrained import describe, load
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import LLAMA

SIZES = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "rope_theta")} | {"head_dim": 8}
GEMMA = {**SIZES, "model_type": "gemma", "num_key_value_heads": 4, "max_position_embeddings": 8192}
GEMMA2 = {**SIZES, "model_type": "gemma2", "query_pre_attn_scalar": 8, "max_position_embeddings": 8192}
GEMMA3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
NORMS = {
    "input_layernorm": "pre_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn/_query_norm",
    "self_attn.k_norm": "attn/_key_norm",
}


def kaggle_tree(hf, arrays):
    """The tree of `{HF name: array}` in Kaggle's layout: a dict per module, whose key is the module's path."""
    last = {k: {"scale": arrays[n]} for k, n in {"transformer/final_norm": "model.norm.weight"}.items()}
    tree = {"transformer/embedder": {"input_embedding": arrays["model.embed_tokens.weight"]}, **last}
    one = hf["model_type"] == "gemma"
    norms = {**NORMS, "post_attention_layernorm": "pre_ffw_norm" if one else "post_attention_norm"}

    def heads(x):
        return x.reshape(-1, hf["head_dim"], x.shape[-1]).transpose(0, 2, 1)

    for i in range(hf["num_hidden_layers"]):
        start, to = f"model.layers.{i}.", f"transformer/layer_{i}"
        layer = {n.removeprefix(start).removesuffix(".weight"): x for n, x in arrays.items() if n.startswith(start)}
        q, k, v = (heads(layer[f"self_attn.{n}_proj"]) for n in "qkv")
        if len(q) == len(k):
            tree[f"{to}/attn/qkv_einsum"] = {"w": np.stack([q, k, v])}
        else:
            tree |= {f"{to}/attn/q_einsum": {"w": q}, f"{to}/attn/kv_einsum": {"w": np.stack([k, v])}}
        o = layer["self_attn.o_proj"].T
        tree[f"{to}/attn/attn_vec_einsum"] = {"w": o.reshape(-1, hf["head_dim"], o.shape[-1])}
        gates = np.stack([layer["mlp.gate_proj"], layer["mlp.up_proj"]])
        tree[f"{to}/mlp/gating_einsum"] = {"w": gates.swapaxes(1, 2) if one else gates}
        tree[f"{to}/mlp/linear"] = {"w": layer["mlp.down_proj"].T}
        tree |= {f"{to}/{norms[n]}": {"scale": x} for n, x in layer.items() if n in norms}
    return tree


@pytest.mark.parametrize("hf", [GEMMA, GEMMA2, GEMMA3], ids=lambda hf: hf["model_type"])
def test_gemma_in_orbax_is_the_checkpoint_of_hugging_face(tmp_path, hf):
    arrays = files.tensors(hf)
    plain = load(str(files.write_directory(tmp_path / "hf", hf, arrays)))
    tree = kaggle_tree(hf, arrays) | {"SigLiPFromPatches_0/head": {"bias": np.zeros(3, np.float32)}}
    ocp.PyTreeCheckpointer().save(tmp_path / "kaggle" / "gemma-it", tree)
    files.write_tokenizer(tmp_path / "kaggle", hf["vocab_size"])
    read = load(str(tmp_path / "kaggle"))
    assert (read.family, read.config) == (hf["model_type"], plain.config)
    jax.tree.map(np.testing.assert_array_equal, read.params, plain.params)


def test_another_model_in_orbax_is_refused(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "m", {"dense": {"kernel": np.zeros((2, 2), np.float32)}})
    with pytest.raises(UserError, match=r"has no array 'transformer/embedder/input_embedding' of 2 dimensions"):
        describe(str(tmp_path / "m"))
