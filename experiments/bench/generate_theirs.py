"""The side of transformers and peft in the benchmark of texts: answers each line on stdin with the texts."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from experiments.bench.generate import NEW
from experiments.bench.theirs import base
from experiments.bench.worker import serve


def main(rows: int, folder: str, merged: bool) -> None:
    """Loads the same weights, adapter and prompts as the other side, merges the adapter if asked, then serves calls."""
    model = PeftModel.from_pretrained(base(), Path(folder) / "adapter").eval()
    model = model.merge_and_unload() if merged else model
    tokens = torch.tensor(np.load(Path(folder) / "prompts.npy"), dtype=torch.long)
    assert len(tokens) == rows
    name = "merged" if merged else "peft"
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}

    def write_texts() -> float:
        with torch.no_grad():
            new = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        np.save(Path(folder) / f"{name}.npy", new[:, tokens.shape[1] :].numpy())
        return 0.0

    serve(write_texts)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
