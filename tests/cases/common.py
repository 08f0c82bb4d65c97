"""Tiny checkpoints, adapters and records for the cases. Each case is `python cases/NAME/case.py`, run in the project's
environment: it makes its input in a temporary folder, hands it to the project, says what came back, and exits with 0
where that is right and with 1 where it is not."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from safetensors.numpy import load_file, save_file  # noqa: F401
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, KV, POSITIONS = 256 + len(SPECIAL), 16, 24, 2, 4, 2, 128
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRE = "base_model.model."


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="case-"))


def tokenizer(where: Path, template: str | None = CHATML, **config) -> Path:
    """Bytes, and the special tokens; `<s>` goes before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    bos = [("<s>", tok.token_to_id("<s>"))]
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=bos)
    where.mkdir(parents=True, exist_ok=True)
    tok.save(str(where / "tokenizer.json"))
    about = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": template, **config}
    (where / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    return where


def llama(where: Path, tied: bool = False, extra: dict | None = None, **config) -> Path:
    """A Llama with random weights; `extra` are further tensors, `config` further keys of config.json."""
    rng, head = np.random.default_rng(0), WIDTH // HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        sizes = {"q": HEADS * head, "k": KV * head, "v": KV * head}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (size, WIDTH) for n, size in sizes.items()}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (WIDTH, HEADS * head)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (HIDDEN, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
        shapes |= {f"{layer}.{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")}
    tensors = {n: rng.normal(0, 0.3, s).astype(np.float32) + (len(s) == 1) for n, s in shapes.items()}
    tokenizer(where)
    save_file({n: x.astype(np.float32) for n, x in (tensors | (extra or {})).items()}, where / "model.safetensors")
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH}
    about |= {"intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    about |= {"num_key_value_heads": KV, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5}
    about |= {"rope_theta": 10000.0, "tie_word_embeddings": tied, "hidden_act": "silu", **config}
    (where / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))
    return where


def adapter(where: Path, tensors: dict, **config) -> Path:
    """A LoRA of rank 2 in the PEFT format."""
    where.mkdir(parents=True, exist_ok=True)
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": 2, "lora_alpha": 4}
    about |= {"lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj"], "modules_to_save": None, **config}
    (where / "adapter_config.json").write_text(json.dumps(about, indent=2))
    save_file({k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}, where / "adapter_model.safetensors")
    return where


def lora(path: str, n_in: int, n_out: int, seed: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.3, (2, n_in)), rng.normal(0, 0.3, (n_out, 2))
    return {f"{PRE}{path}.lora_A.weight": a, f"{PRE}{path}.lora_B.weight": b}


def on_queries() -> dict:
    return {k: x for i in range(LAYERS) for k, x in lora(f"model.layers.{i}.self_attn.q_proj", WIDTH, WIDTH, i).items()}


def logits(base, params=None) -> np.ndarray:
    import jax.numpy as jnp

    from lowrank.models import build_model

    tokens = jnp.asarray([[256, 40, 41, 42, 60, 61, 62, 70]])
    return np.asarray(build_model(base.config).apply({"params": base.params if params is None else params}, tokens))


def with_adapter(base: Path, where: Path) -> np.ndarray:
    from lowrank import pretrained
    from lowrank.adapters import peft

    model = pretrained.load(str(base))
    return logits(model, peft.load(str(where), model.params, model, any_base=True))


def jsonl(where: Path, records: list) -> Path:
    where.write_text("".join(json.dumps(r) + "\n" for r in records))
    return where


def encoded(path: Path, tok, **config) -> list[tuple[list[int], list[int]]]:
    """`(ids, the ids that are learned)` of each sequence of a JSONL file."""
    from lowrank import data
    from lowrank.data.examples import Examples
    from lowrank.data.language import LANGUAGE

    settings = {"seq_len": 512, "batch_size": 1, "packing": False, "prompt_loss_weight": 0.0, **config}
    examples = Examples(data.DataConfig(source=f"jsonl:{path}", **settings), LANGUAGE, tok)
    found = [s for i in range(len(examples)) for s in examples.sequences(i)]
    learned = [[int(t) for t, w in zip(s["targets"], s["weights"], strict=True) if w == 1] for s in found]
    return [([int(s["tokens"][0]), *map(int, s["targets"])], ids) for s, ids in zip(found, learned, strict=True)]


def read_tokenizer(where: Path, hf_config: dict | None = None):
    from lowrank.pretrained import tokenizer as tokenizers

    return tokenizers.load_tokenizer(where, hf_config or {})


def text(tok, ids: list[int]) -> str:
    return tok.backend.decode(ids, skip_special_tokens=False)


def command(module: str, *args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, **options)


def tiny_config() -> str:
    import configs.tiny

    return configs.tiny.__file__


def verdict(ok: bool, said: str) -> None:
    print(("right: " if ok else "wrong: ") + said)
    sys.exit(0 if ok else 1)


def attempt(make):
    """`(result, what was said)`; a stack trace is never right."""
    from lowrank.core.errors import UserError

    try:
        return make(), ""
    except UserError as e:
        return None, f"error: {e}"
    except Exception as e:
        return None, f"stack trace: {traceback.format_exception_only(e)[0].strip()}"
