import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gguf
import numpy as np

from lowrank import pretrained
from tests.cases import common


def file(where: Path, pre: str | None) -> Path:
    base = common.llama(where.parent / "base", tied=True)
    tensors, words = (
        common.load_file(base / "model.safetensors"),
        ["<|end|>", "1", "2", "3", "12", "123", "a", "Ġ", "Ġa"],
    )
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")
    }
    out = gguf.GGUFWriter(where, "llama")
    out.add_context_length(128), out.add_embedding_length(16), out.add_block_count(2), out.add_feed_forward_length(24)
    out.add_head_count(4), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(1e-5), out.add_rope_freq_base(1e4)
    out.add_tokenizer_model("gpt2"), out.add_token_list(words), out.add_token_types([3] + [1] * 8)
    out.add_token_merges(["1 2", "12 3", "Ġ a"]), out.add_eos_token_id(0), out.add_bos_token_id(0)
    if pre:
        out.add_tokenizer_pre(pre)
    for name, x in tensors.items():
        stem = name.removesuffix(".weight")
        i, _, rest = stem.removeprefix("model.layers.").partition(".") if ".layers." in stem else ("", "", stem)
        x = x[: len(words)] if "embed" in name else x
        out.add_tensor(f"{f'blk.{i}.' if i else ''}{names[rest]}.weight", np.ascontiguousarray(x))
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    return where


root = common.folder()
named = pretrained.load(str(file(root / "a.gguf", "qwen2"))).tokenizer.encode("a 123")
bare, said = common.attempt(lambda: pretrained.load(str(file(root / "b.gguf", None))).tokenizer.encode("a 123"))
print(f"with tokenizer.ggml.pre: {named}; without it: {said or bare}")
common.verdict(
    bare is None and said.startswith("error"),
    "a byte-level vocabulary that does not say how text is cut is not guessed at in silence",
)
