"""Laws of GGUF models: a file that llama.cpp converted is the checkpoint that it was converted from."""

import jax
import numpy as np
import pytest

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.pretrained import describe, load
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import GEMMA3, GPT2, LLAMA
from tests.support.close import assert_close, assert_same

UNTIED = {**LLAMA, "tie_word_embeddings": False}
ORIGINAL = {"original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.25]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
NEOX = {k: x for k, x in UNTIED.items() if k not in ("rms_norm_eps", "rope_theta", "num_key_value_heads")}
NEOX |= {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 10000, "layer_norm_eps": 1e-6}
GRANITE = {
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
}
TWINS = {
    "llama": ("llama", LLAMA),
    "llama-untied": ("llama", UNTIED),
    "llama-biased": ("llama", {**LLAMA, "attention_bias": True}),
    "llama-yarn": ("llama", {**LLAMA, "rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "qwen2": ("qwen2", {**UNTIED, "model_type": "qwen2"}),
    "qwen3": ("qwen3", {**LLAMA, "model_type": "qwen3", "head_dim": 8}),
    "qwen3-yarn": (
        "qwen3",
        {**LLAMA, "model_type": "qwen3", "head_dim": 8, "rope_scaling": {**YARN, "attention_factor": 1.5}},
    ),
    "gemma2": ("gemma2", {**GEMMA3, **CAPS, "model_type": "gemma2", "num_hidden_layers": 2, "rope_theta": 10000.0}),
    "gemma3": ("gemma3", {**GEMMA3, "rope_local_base_freq": 20000.0}),
    "gpt2": ("gpt2", GPT2),
    "gemma": ("gemma", {**LLAMA, "model_type": "gemma", "head_dim": 8, "rope_theta": 10000.0}),
    "phi3": ("phi3", {**UNTIED, "model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 8}),
    "phi3-longrope": ("phi3", {**UNTIED, "model_type": "phi3", "rope_scaling": LONGROPE, **ORIGINAL}),
    "phi4": ("phi3", {**UNTIED, "model_type": "phi3", "sliding_window": None}),
    "olmo2": ("olmo2", {**UNTIED, "model_type": "olmo2", "rms_norm_eps": 1e-6}),
    "granite": ("granite", {**LLAMA, **GRANITE, "model_type": "granite"}),
    "granite-biased": ("granite", {**UNTIED, **GRANITE, "model_type": "granite", "attention_bias": True}),
    "smollm3": ("smollm3", {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 5}),
    "gptneox": ("gptneox", NEOX),
    "gptneox-serial": ("gptneox", {**NEOX, "use_parallel_residual": False}),
}
FACTORS = {f"rope_factors_{n}.weight": np.array(LONGROPE[f"{n}_factor"], np.float32) for n in ("long", "short")}


@pytest.mark.parametrize("name", TWINS)
def test_a_converted_file_is_the_checkpoint_it_came_from(tmp_path, name):
    arch, hf = TWINS[name]
    hf = {k: v for k, v in hf.items() if not (arch == "llama" and k == "head_dim")}
    arrays = files.tensors(hf)
    arrays |= {k: x.astype(np.float16).astype(np.float32) for k, x in arrays.items() if "norm" in k}  # 1 + x is exact
    folder = files.write_directory(tmp_path / "hf", hf, arrays)
    metadata = {**files.gguf_metadata(hf, arch), **files.vocabulary()}
    converted = files.converted(arrays, arch) | (FACTORS if name == "phi3-longrope" else {})
    path = files.write_gguf(tmp_path / "twin.gguf", metadata, converted)
    one, two = load(str(folder)), load(str(path))
    assert two.config == one.config
    close(one.params, two.params)
    assert (two.family, two.name, two.new) == (hf["model_type"], "twin", ())


def close(ours, theirs):
    """Equal, but for the rounding of Gemma's 1 + w."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_close(ours, theirs)


def test_heads_that_are_split_over_devices_are_put_back_in_order(tmp_path):
    arrays = files.tensors(LLAMA)
    path = str(files.gguf_twin(tmp_path / "twin.gguf", LLAMA, arrays, "llama"))
    assert_same(load(path).params, load(path, mesh=sharding.make_mesh(1, 1, 8)).params)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_found_again(tmp_path, factor):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = {**LLAMA, "hidden_size": 128, "rope_theta": 500000.0, "rope_scaling": scaling}
    arrays = files.tensors(hf)
    frequencies = 500000.0 ** (-np.arange(0, 32, 2) / 32)
    factors = []
    for wavelength in 2 * np.pi / frequencies:  # as transformers and llama.cpp write it
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < 8192 / 4.0 else factor if wavelength > 8192 / 1.0 else between)
    gguf_arrays = files.converted(arrays, "llama") | {"rope_freqs.weight": np.array(factors, np.float32)}
    metadata = files.gguf_metadata(hf, "llama") | files.vocabulary()
    path = files.write_gguf(tmp_path / "x.gguf", metadata, gguf_arrays)
    folder = files.write_directory(tmp_path / "hf", hf, arrays)
    assert load(str(path)).config == load(str(folder)).config
    gguf_arrays["rope_freqs.weight"][3] += 1
    path = files.write_gguf(tmp_path / "y.gguf", metadata, gguf_arrays)
    with pytest.raises(UserError, match=r"'rope_freqs\.weight' is not the rope scaling of Llama 3"):
        describe(str(path))


def test_linear_and_yarn_scaling_are_kept_and_others_are_refused(tmp_path):
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config, _, _ = describe(str(files.gguf_twin(tmp_path / "a.gguf", LLAMA, files.tensors(LLAMA), "llama", **scaled)))
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 4.0)
    scaled |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 16}
    scaled["llama.rope.scaling.attn_factor"] = 2.0
    config, _, _ = describe(str(files.gguf_twin(tmp_path / "b.gguf", LLAMA, files.tensors(LLAMA), "llama", **scaled)))
    assert (config.rope_scaling.kind, config.rope_scaling.original_positions) == ("yarn", 16)
    assert_close(config.rope_scaling.of_cosines, 2 * (0.1 * np.log(4) + 1), relative=1e-8)
    scaled["llama.rope.scaling.type"] = "yearn"
    path = files.gguf_twin(tmp_path / "c.gguf", LLAMA, files.tensors(LLAMA), "llama", **scaled)
    with pytest.raises(UserError, match="unknown rope scaling 'yearn'"):
        describe(str(path))


def test_the_27b_gemma_scales_attention_by_its_width(tmp_path):
    hf = {**GEMMA3, "num_hidden_layers": 62, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 4}
    path = files.gguf_twin(tmp_path / "x.gguf", hf, files.tensors(hf), "gemma3")
    assert describe(str(path))[0].attn_scale == 2**-0.5


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general.architecture": "lama"},
            r"unknown GGUF architecture 'lama' \(did you mean 'llama'\?\); known: gemma, gemma2",
        ),
        ({"llama.attention.head_count": [4, 4, 2]}, "it must be one number, the same for all layers"),
        ({"llama.attention.sliding_window": 8}, r"x\.gguf: llama\.attention\.sliding_window=8 is not supported"),
        ({"llama.expert_count": 4}, r"llama\.expert_count=4 is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "unknown GGUF tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "smolm"}, r"unknown GGUF pre-tokenizer 'smolm' \(did you mean 'smollm'"),
        ({"tokenizer.ggml.eos_token_id": 99}, "eos_token_id 99 is not in the vocabulary of 32"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token type for 32 tokens"),
        ({"tokenizer.ggml.merges": ["a q"]}, "the tokenizer cannot be rebuilt"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path, metadata, message):
    path = tmp_path / "x.gguf"
    full = {**files.gguf_metadata(LLAMA, "llama"), **files.vocabulary(), **metadata}
    files.write_gguf(path, full, files.converted(files.tensors(LLAMA), "llama"))
    with pytest.raises(UserError, match=message) as error:
        describe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"),
        ({"blk.1.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}, r"'blk\.1\.ffn_gate_exps\.weight' has no place"),
        ({"blk.1.ffn_up.weight": np.ones((2, 16), np.float32)}, r"up_proj\.weight' has shape \(2, 16\)"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    arrays = files.converted(files.tensors(LLAMA), "llama") | change
    arrays = {name: x for name, x in arrays.items() if x is not None}
    metadata = files.gguf_metadata(LLAMA, "llama") | files.vocabulary()
    with pytest.raises(UserError, match=message):
        load(str(files.write_gguf(tmp_path / "x.gguf", metadata, arrays)))


def test_a_tokenizer_larger_than_the_vocabulary_is_read(tmp_path):
    metadata = files.gguf_metadata(LLAMA, "llama") | files.vocabulary(40)
    path = files.write_gguf(tmp_path / "x.gguf", metadata, files.converted(files.tensors(LLAMA), "llama"))
    assert load(str(path)).tokenizer.token(39)
