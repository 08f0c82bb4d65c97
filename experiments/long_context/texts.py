"""The texts of the study: BBC News, and passages of it in which a pass key is hidden, with a small vocabulary for both.

Prompts of the test split are made of articles that no model is trained on.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lowrank.core.files import scratch_beside
from lowrank.core.paths import expand
from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source
from lowrank.evaluation import long_context
from lowrank.evaluation.long_context import retrieval
from lowrank.pretrained.tokenizer import Tokenizer

END = "<|end|>"
SPLITS = ("train", "test")


def articles(split: str) -> list[str]:
    """The texts of a split of BBC News, with their headlines."""
    source = open_source("bbc_news", split, expand(DATA_DIR))
    return [f"{record['title']}\n\n{record['text']}" for record in map(source.__getitem__, range(len(source)))]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level BPE of this many tokens, learned from the training articles; each digit is a token."""
    backend = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=letters)
    asked = retrieval.INTRODUCTION + retrieval.NEEDLE + retrieval.QUESTION
    backend.train_from_iterator([*articles("train"), *[asked] * 200], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": END}))


def stream(tokenizer: Tokenizer, split: str) -> np.ndarray:
    """The token ids of a split, article after article."""
    ends = [[*tokenizer.encode(text), tokenizer.eos_id] for text in articles(split)]
    return np.concatenate([np.array(ids, np.int32) for ids in ends])


def write_records(folder: Path, tokenizer: Tokenizer, lengths: tuple[int, int], count: int) -> None:
    """Writes `texts/train.jsonl` of articles, and `keys/train.jsonl` of `count` prompts with their pass keys.

    The prompts have `lengths` tokens, drawn from this range with a uniform logarithm, and depths from 0 to 1.
    """
    draw, filler = random.Random(0), stream(tokenizer, "train").tolist()
    keys = []
    for i in range(count):
        size, depth = round(math.exp(draw.uniform(*map(math.log, lengths)))), draw.random()
        (prompt,) = long_context.prompts("passkey", tokenizer, size, depth, samples=1, seed=i + 1, filler=filler)
        texts = {"prompt": prompt.ids, "completion": prompt.answer}
        keys.append({name: tokenizer.decode(ids, special=True) for name, ids in texts.items()})
    _write(folder / "keys", keys)
    _write(folder / "texts", [{"text": text} for text in articles("train")])


def _write(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(folder, folder=True) as scratch:
        (scratch / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        scratch.rename(folder)
