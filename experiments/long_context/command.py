"""Runs the study: `python -m experiments.long_context [--size=small] [--workers=1] [--folder=DIR] [--results=DIR]`.

    --size=small     ci (two steps of a model of one block, to see that all works), or small
    --workers=1      0 writes the tables of what is done
    --folder=DIR     the folder of models and scores; by default runs/long_context/SIZE
    --results=DIR    where tables and plots go; by default experiments/long_context/results for `small`, else in runs/

It trains a decoder, takes it to a longer context in every way, scores each model, and writes the tables and, for the
committed results, the README's. The same command continues a study that was stopped.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.long_context import sizes, table, texts, trained
from experiments.long_context.sizes import Size
from experiments.protocol import plain_command
from lowrank import pretrained
from lowrank.core.files import read_json, write_json
from lowrank.evaluation import long_context
from lowrank.models import build_model
from lowrank.pretrained import Pretrained

NAME = "long_context"
ROWS = 2  # of a batch that is scored


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    return plain_command.main(NAME, __doc__, argv, sizes.get_size, run, table.write_tables, table.markdown)


def run(size: Size, folder: Path) -> None:
    """Trains and scores what is missing."""
    random = trained.write_random(size, folder)
    trained.write_data(size, folder, pretrained.describe(str(random))[1])
    base = trained.train_base(size, folder)
    if not (path := folder / "base.json").exists():
        model = pretrained.load(str(base))
        write_json(path, scores(size, model, size.length, retrieval=True))
    found = table.base_found(read_json(path), size)
    for way in tqdm(size.ways, unit="way", dynamic_ncols=True):
        if not (path := folder / f"{way.file}.json").exists():
            model = trained.extended(size, folder, way)
            write_json(path, scores(size, model, size.longest, retrieval=found >= table.ENOUGH))


def scores(size: Size, model: Pretrained, context: int, retrieval: bool) -> dict[str, Any]:
    """Of held-out text: perplexity in windows of the base's context, and by position up to `context`.

    With `retrieval`, also the cells of pass keys in prompts of up to `context` tokens.
    """
    reader = long_context.Reader(build_model(model.config), model.params, rows=ROWS)
    held_out = texts.stream(model.tokenizer, "test")
    documents = [held_out[: size.rows * size.longest + 1]]
    old = long_context.token_scores(reader, documents, size.length, size.length // 2)
    by_position = long_context.token_scores(reader, documents, context, context)
    bins = size.bins * context // size.longest
    found = {"old": float(old.nll.mean()), "positions": long_context.by_position(by_position, bins)}
    lengths = [n for n in size.lengths if n <= context]
    how = {"samples": size.samples, "filler": np.asarray(held_out)}
    asked = (reader, model.tokenizer, "passkey", lengths, size.depths) if retrieval else None
    cells = long_context.retrieve(*asked, **how) if asked else ()
    return found | {"cells": [dataclasses.asdict(cell) for cell in cells]}
