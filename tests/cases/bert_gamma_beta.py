import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import json

import numpy as np

from lowrank import pretrained
from tests.cases import common


def bert(where: Path, old: bool) -> Path:
    rng, w, h = np.random.default_rng(0), common.WIDTH, common.HIDDEN
    shapes = {
        f"embeddings.{n}_embeddings.weight": (s, w)
        for n, s in (("word", common.VOCAB), ("position", 64), ("token_type", 2))
    }
    linear = {"attention.self.query": (w, w), "attention.self.key": (w, w), "attention.self.value": (w, w)}
    linear |= {"attention.output.dense": (w, w), "intermediate.dense": (h, w), "output.dense": (w, h)}
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        for n, s in linear.items():
            shapes |= {f"encoder.layer.{i}.{n}.weight": s, f"encoder.layer.{i}.{n}.bias": s[:1]}
        norms += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    scale, shift = ("gamma", "beta") if old else ("weight", "bias")
    shapes |= {f"{n}.{k}": (w,) for n in norms for k in (scale, shift)}
    tensors = {f"bert.{n}": rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    common.tokenizer(where, cls_token="<s>", sep_token="<|im_end|>")
    common.save_file(tensors, where / "model.safetensors")
    config = {
        "model_type": "bert",
        "vocab_size": common.VOCAB,
        "hidden_size": w,
        "intermediate_size": h,
        "num_hidden_layers": 2,
    }
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu"}
    (where / "config.json").write_text(json.dumps(config))
    return where


root = common.folder()
new, _ = common.attempt(lambda: pretrained.load(str(bert(root / "new", False)), model={"num_labels": 2}))
old, said = common.attempt(lambda: pretrained.load(str(bert(root / "old", True)), model={"num_labels": 2}))
same = old is not None and np.array_equal(old.params["embed"]["norm"]["scale"], new.params["embed"]["norm"]["scale"])
common.verdict(same, said or "read under both names")
