"""The clients' data: BBC articles, of which each client has its own mixture of sections."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank import data
from lowrank.core.files import scratch_beside
from lowrank.data import sources
from lowrank.data.bbc_news import LABELS
from lowrank.data.config import DATA_DIR, DataConfig
from lowrank.objectives import build_objective

CONCENTRATION = 0.5  # of the Dirichlet distribution of a section's articles over the clients
SPLIT = "train"


def partition(labels: Sequence[int], count: int, rng: np.random.Generator) -> list[list[int]]:
    """The records of each client: every label's records are shared out by a draw of the Dirichlet distribution.

    Each client has at least one record (Hsu et al. 2019, arXiv:1909.06335).
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    for label in sorted(set(labels)):
        own = rng.permutation([i for i, found in enumerate(labels) if found == label])
        ends = np.round(np.cumsum(rng.dirichlet([CONCENTRATION] * count)) * len(own)).astype(int)
        for part, chosen in zip(parts, np.split(own, ends[:-1]), strict=True):
            part.extend(chosen.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts


def write(folder: Path, count: int, source: str = "bbc_news") -> list[int]:
    """Writes the records of `count` clients, unless they exist; returns how many each has."""
    if not folder.exists():
        found = sources.open_source(source, SPLIT, DATA_DIR)
        names = found.labels("label") or LABELS
        records: list[Mapping[str, Any]] = [found[i] for i in range(len(found))]
        labels = [_name(record["label"], names) for record in records]
        parts = partition([sorted(set(labels)).index(x) for x in labels], count, np.random.default_rng(0))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder, folder=True) as scratch:
            for client, part in enumerate(parts):
                lines = [json.dumps({"text": str(records[i]["text"]), "label": labels[i]}) + "\n" for i in part]
                (scratch / f"{client}.jsonl").write_text("".join(lines), encoding="utf-8")
            scratch.rename(folder)
    return [len((folder / f"{client}.jsonl").read_text().splitlines()) for client in range(count)]


def _name(label: Any, names: Sequence[str]) -> str:
    return label if isinstance(label, str) else names[int(label)]


def loader(source: str, tokenizer: Any, labels: Sequence[str], **options: Any) -> data.Loader:
    """Batches of articles with their labels."""
    fixed = {"template": "text", "labels": tuple(labels), "prefetch": 0}
    objective = build_objective("classification")
    return data.make_loader(DataConfig(source=source, **fixed, **options), tokenizer, row_format=objective.row_format)
