"""Tiny checkpoints on disk: Hugging Face directories, and GGUF files as llama.cpp would convert them."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lowrank.core import tree
from lowrank.models import build_model
from lowrank.pretrained.families import family_of
from tests.support.llama_cpp import converted, gguf_metadata

__all__ = ["converted", "gguf_metadata"]

VOCAB = 32
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
BERT = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "rope_theta", "num_key_value_heads")}
BERT = {**BERT, "model_type": "bert", "type_vocab_size": 2}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def shapes(hf_config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint, by its Hugging Face name."""
    family = family_of(hf_config)
    config = family.config(hf_config)
    tree_of = jax.eval_shape(
        lambda: build_model(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    )
    leaves, out = {name: leaf.shape for name, leaf in tree.named_leaves(tree_of)}, {}
    for tensor in family.tensors(config):
        shape = leaves[tensor.leaf][len(tensor.stack) :]
        out |= dict.fromkeys(tensor.names, shape[::-1] if tensor.transpose else shape)
    return out


def tensors(hf_config: dict) -> dict[str, np.ndarray]:
    """Random tensors for a config, float32, by their Hugging Face names."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(hf_config).items()}


def write_directory(
    folder: Path, hf_config: dict, arrays: dict[str, np.ndarray], dtype: str = "F32", shards: int = 1
) -> Path:
    """A Hugging Face directory that holds `arrays` in `dtype`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(x.astype(DTYPES[dtype])) for name, x in arrays.items()}
    (folder / "config.json").write_text(json.dumps(hf_config))
    write_tokenizer(folder, hf_config["vocab_size"])
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(arrays)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in arrays.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of `size` words: <pad> <s> </s> [UNK] w4 w5 ..."""
    words = ["<pad>", "<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(4, size))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def change_tokenizer(folder: Path, **changes) -> None:
    """Changes these keys of the folder's `tokenizer_config.json`."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def directory(folder: Path, hf_config: dict, **options) -> Path:
    """A Hugging Face directory of random tensors."""
    return write_directory(folder, hf_config, tensors(hf_config), **options)


def write_gguf(path: Path, metadata: dict, arrays: dict[str, np.ndarray], kinds: dict[str, str] | None = None) -> Path:
    """A GGUF file; `kinds` names the block format of the tensors that are not stored as they are."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    put = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            put.get(type(value), writer.add_array)(key, value)
    for name, array in arrays.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(size: int = VOCAB) -> dict:
    """The metadata of a byte-level tokenizer of letters and the one word `ab`."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", *(f"<{i}>" for i in range(30, size))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens[:size],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def gguf_twin(path: Path, hf: dict, arrays: dict[str, np.ndarray], arch: str, **metadata) -> Path:
    """The GGUF file of a checkpoint."""
    return write_gguf(path, {**gguf_metadata(hf, arch), **vocabulary(), **metadata}, converted(arrays, arch))
