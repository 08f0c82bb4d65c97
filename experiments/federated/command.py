"""Runs the study: `python -m experiments.federated [--size=small] [--workers=1] [--folder=DIR] [--results=DIR]`.

    --size=small     ci (two rounds of one step, to see that all works), or small
    --workers=1      0 writes the tables of what is done
    --folder=DIR     the folder of the clients' records and of the scores; by default runs/federated/SIZE
    --results=DIR    where tables and plots go; by default experiments/federated/results for `small`, else in runs/

Each row and seed is a file of its scores after every round. The same command continues a study that was stopped, and
runs none of them twice.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.federated import clients, rounds, table
from experiments.federated.rounds import ROWS, Row
from experiments.protocol import plain_command
from lowrank import pretrained
from lowrank.core.errors import unknown
from lowrank.core.files import write_json
from lowrank.data.bbc_news import LABELS
from lowrank.evaluation import evaluate
from lowrank.models import build_model
from lowrank.pretrained import Pretrained

NAME = "federated"


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study: `steps` of each client in a round, and the test articles that score a model; 0: all."""

    rounds: int
    steps: int
    seeds: int
    articles: int
    clients: int = 4
    batch: int = 16
    length: int = 32
    model: str = "minilm-l6"
    source: str = "bbc_news"
    labels: tuple[str, ...] = LABELS


SIZES = {
    "ci": Size(rounds=2, steps=1, seeds=2, articles=8, batch=4, length=16),
    "small": Size(rounds=5, steps=6, seeds=3, articles=0),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parts = (get_size, run, _write, table.markdown)
    return plain_command.main(NAME, __doc__, argv, *parts)


def get_size(name: str) -> Size:
    """The size of a name. Raises UserError for another one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]


def _write(size: Size, folder: Path, results: Path) -> None:
    table.write_tables(folder, results, size.seeds)


def run(size: Size, folder: Path) -> None:
    """Runs every row and seed whose file is missing."""
    samples = clients.write(folder / "clients", size.clients, size.source)
    missing = [(row, seed) for row in ROWS for seed in range(size.seeds) if not table.path(folder, row, seed).exists()]
    with tqdm(total=len(missing) * size.rounds, unit="round", dynamic_ncols=True) as bar:
        for row, seed in missing:
            write_json(table.path(folder, row, seed), run_row(size, folder, samples, row, seed, bar))


def run_row(size: Size, folder: Path, samples: Sequence[int], row: Row, seed: int, bar: Any) -> dict[str, list[float]]:
    """The accuracy and the relative gap of a row after each round."""
    options = {"remat": "none", "num_labels": len(size.labels)}
    base = pretrained.load(size.model, model=options, seed=seed)
    state, scores = rounds.start(base, row, seed), {"accuracy": [], "gap": []}  # type: ignore[var-annotated]
    batches = [_batches(size, base, folder / "clients" / f"{k}.jsonl", seed) for k in range(size.clients)]
    if row.pooled:
        batches, samples = [_batches(size, base, folder / "clients" / "*.jsonl", seed)], [sum(samples)]
    for i in range(size.rounds):
        state = rounds.run_round(state, row, base, batches, samples, size.steps, 1000 * (seed + 1) + i)
        scores["accuracy"].append(_accuracy(size, base, state))
        scores["gap"].append(state.gap)
        bar.update()
    return scores


def _batches(size: Size, base: Pretrained, path: Path, seed: int) -> Any:
    shape = {"seq_len": size.length, "batch_size": size.batch, "seed": seed}
    return clients.loader(f"jsonl:{path}", base.tokenizer, size.labels, **shape)


def _accuracy(size: Size, base: Pretrained, state: rounds.State) -> float:
    once = {"split": "test", "shuffle": False, "epochs": 1, "max_examples": size.articles}
    shape = {"seq_len": size.length, "batch_size": size.batch}
    batches = clients.loader(size.source, base.tokenizer, size.labels, **shape, **once)
    return evaluate(rounds.CLASSIFICATION, build_model(base.config), state.params, batches)["accuracy"]
