"""A tiny random checkpoint in the Hugging Face layout, and records to train it on. For tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "the a cat dog sun moon sat ran saw ate red blue big small on under . : what is where who ?"
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 16, 32, 3, 4, 2, 64


def vocabulary() -> list[str]:
    return ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "[UNK]", *WORDS.split()]


def llama(folder: Path) -> Path:
    """Writes a Llama of three layers; returns `folder`."""
    head = WIDTH // HEADS
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary()),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": False,
    }
    shapes = {
        "model.embed_tokens.weight": (len(vocabulary()), WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (len(vocabulary()), WIDTH),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, size in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, WIDTH)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, HEADS * head)
        shapes[f"{layer}.self_attn.o_proj.bias"] = (WIDTH,)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{layer}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    return _write(folder, config, shapes)


def bert(folder: Path) -> Path:
    """Writes a BERT of three layers; returns `folder`."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(vocabulary()),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    tables = {"word": len(vocabulary()), "position": POSITIONS, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (size, WIDTH) for name, size in tables.items()}
    shapes |= {f"embeddings.LayerNorm.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        sizes = {f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (HIDDEN, WIDTH)}
        sizes |= {"output.dense": (WIDTH, HIDDEN)}
        for name, size in sizes.items():
            shapes |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    return _write(folder, config, shapes)


def records(path: Path, count: int = 40) -> Path:
    """Writes records with `prompt`, `completion`, `text` and `label`; returns `path`."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        animal, place = rng.choice(["cat", "dog"]), rng.choice(["sun", "moon"])
        text = f"the {rng.choice(['big', 'small'])} {animal} sat under the {rng.choice(['red', 'blue'])} {place} ."
        record = {"prompt": f"{text} who sat ? :", "completion": f" the {animal}", "text": text, "label": str(animal)}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def pairs(path: Path, count: int = 24) -> Path:
    """Writes records with `prompt`, `chosen` and `rejected`, and with a `completion` that `label` judges."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        animal, place = rng.choice(["cat", "dog"]), rng.choice(["sun", "moon"])
        prompt = f"the {rng.choice(['big', 'small'])} {animal} sat under the {place} . who sat ? :"
        chosen, rejected = f" the {animal}", f" the {place} sat on the {place}"
        record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 0.5 * (i % 2)}
        record |= {"completion": rejected if i % 3 else chosen, "label": i % 3 == 0}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def _write(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight") or "LayerNorm.weight" in name
        else rng.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if config["model_type"] == "bert" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder
