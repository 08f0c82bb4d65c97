"""Prompts of several lengths and starts on two sizes of a model, and the tokens nearest to what was learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plotting
from experiments.protocol import measures, models, paper_runs
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, read_rows
from experiments.protocol.tasks import headlines
from lowrank.adapters import nearest_tokens
from lowrank.core.paths import AnyPath
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.tables import markdown_table, write_csv
from lowrank.training.loop import ADAPTER

SMOLLM2, FIRST = "smollm2-135m", 8
TEXT = "Write a short headline for this news article."  # in place of the labels of the classes
WORDS_FILE, SHOWN = "words.csv", 8  # virtual tokens of a row
WHOLE = "whole model"
SIZES = {WHOLE: SMOLLM2, f"first {FIRST} blocks": str(models.first_blocks_folder(SMOLLM2, FIRST))}


def row(size: str, model: str, length: int, init: str) -> Row:
    """A prompt of a length and a start."""
    method: dict[str, Any] = {"name": "prompt", "length": length, "init": init}
    if init == "text":
        method["text"] = TEXT
    return Row({"size": size, "length": str(length), "start": init}, {"method": method, "model.name": model})


def rows(sizes: Mapping[str, str], lengths: Sequence[int], lengths_of_others: Sequence[int]) -> tuple[Row, ...]:
    """Every length on the first size, with the other starts at 20 tokens, and fewer lengths on the other sizes."""
    (first, model), *others = sizes.items()
    found = [row(first, model, length, "vocabulary") for length in lengths]
    found += [row(first, model, 20, init) for init in ("random", "text")]
    found += [row(size, of, length, "vocabulary") for size, of in others for length in lengths_of_others]
    return tuple(found)


def prepare() -> None:
    """Writes the smaller size."""
    models.write_first_blocks(SMOLLM2, FIRST)


def measure(model: Model) -> dict[str, float]:
    """The mean cosine of a virtual token and its nearest token, and its mean length over that of the embeddings."""
    _, cosines = nearest_tokens.nearest(model.base.params, 1)
    lengths = [
        np.mean(np.linalg.norm(np.asarray(model.base.params[name]["embedding"], np.float32), axis=-1))
        for name in ("prompt", "embed")
    ]
    return {"cosine": float(np.mean(cosines)), "length_ratio": float(lengths[0] / lengths[1])}


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes the measures, and the tokens that are nearest to the prompts of the first seed."""
    lines = measures.write(experiment, study, results, measure, untrained=False)
    per_row = len(study.cells) // len(lines)
    words = []
    for i, line in enumerate(lines):
        cell = study.cells[i * per_row]
        base = measures.load_model(cell.config, study.run_path(cell.key) / ADAPTER).base
        ids, cosines = nearest_tokens.nearest(base.params, 1)
        for place, (token, cosine) in enumerate(zip(ids[:SHOWN, 0], cosines[:SHOWN, 0], strict=True)):
            spelt = base.tokenizer.backend.id_to_token(int(token))
            labels = {label: line[label] for label in experiment.labels}
            words.append({**labels, "place": place, "token": spelt, "cosine": float(cosine)})
    write_csv(results / WORDS_FILE, list(words[0]), words)


def more(experiment: Experiment, folder: Path) -> str:
    """The measures, and the nearest tokens of each row."""
    table = measures.markdown(experiment, folder, HEADINGS)
    if not (folder / WORDS_FILE).exists():
        return table
    found: dict[tuple[str, ...], list[str]] = {}
    for line in read_rows(folder / WORDS_FILE):
        labels = tuple(line[label] for label in experiment.labels)
        found.setdefault(labels, []).append(f"`{line['token']}`")
    head = [*experiment.labels, f"nearest tokens of the first {SHOWN} virtual tokens, first seed"]
    lines = [[*labels, " ".join(tokens)] for labels, tokens in found.items()]
    return f"{table}\n\n{markdown_table(head, lines, len(head))}"


HEADINGS = {
    "cosine": Heading("cosine to the nearest token"),
    "length_ratio": Heading("length over that of a token"),
}


def plot(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The cross-entropy against the length of the prompt, a line for each size and start."""
    figure, [axes] = plotting.make_figure(width=5.6)
    series: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for row in rows:
        x, means, halves = series.setdefault(f"{row['size']}, {row['start']}", ([], [], []))
        x.append(float(row["length"]))
        means.append(as_number(row["score_mean"]))
        halves.append(as_number(row["score_ci95"]))
    plotting.draw_lines(axes, series)
    axes.set_xscale("log")
    axes.set_xlabel("virtual tokens")
    axes.set_ylabel("nats per token of a headline")
    return plotting.to_png(figure)


PAPER = paper_runs.instructions(
    "llama2-7b",
    "tfds:glue/rte",
    "{sentence1}\nQuestion: is it true that {sentence2}\nAnswer:",
    " {label}",
    steps=30_000,
    batch_size=32,
    seq_len=256,
    schedule="constant",
)
EXPERIMENT = Experiment(
    name="prompt_length",
    question="How long must a learned prompt be, how should it start, and what does it say?",
    metric="nll",
    baseline={"length": "20", "start": "vocabulary"},
    within=("size",),
    small=Size(headlines(), rows(SIZES, (1, 5, 20, 100), (1, 20)), rates=(3e-2, 1e-1), seeds=3, rate_seeds=1),
    paper=Size(
        PAPER,
        rows({WHOLE: f"{paper_runs.MODELS}/llama2-7b"}, (1, 5, 20, 100, 150), ()),
        rates=(1e-2, 3e-2, 1e-1, 3e-1),
        seeds=3,
        rate_seeds=1,
        splits=("validation", "validation"),
    ),
    analyze=analyze,
    plot=plot,
    prepare=prepare,
    more=more,
)
get_study = EXPERIMENT.get_study
