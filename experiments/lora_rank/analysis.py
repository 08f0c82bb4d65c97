"""What the adapters of the final phase learned, in the middle layer: `phi.csv`, `amplification.csv` and `phi.png`."""

import collections
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import plotting
from experiments.lora_rank.subspaces import Amplification, amplification, input_directions, phi
from experiments.protocol.experiment import Experiment
from experiments.protocol.table import as_number, read_rows
from lowrank.adapters import load
from lowrank.core.files import write_bytes
from lowrank.core.paths import AnyPath
from lowrank.core.weight import materialize
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.statistics import interval
from lowrank.sweeps.tables import format_mean, markdown_table, write_csv
from lowrank.training.loop import ADAPTER

KERNELS = ("q", "v")
NARROW, WIDE = 8, 64  # the ranks of the paper's figure 3, if the study has them
SEEDS = (0, 1)
MATRICES = ("A", "dW")
CHANCE = "two Gaussians"
AMPLIFICATIONS = "amplification.csv"
# Of the paper's Table 7: kernel, rank, then the columns of `Amplification`, and the factor.
PRINTED = "GPT-3's q, layer 48 of 96 (arXiv:2106.09685, Table 7)", "4", "61.95", "6.91", "0.32", "21.67", "0.02", "21.5"


class Update(NamedTuple):
    """A kernel of the middle layer with what a run added to it."""

    weight: np.ndarray  # [in, out]
    a: np.ndarray  # [in, r]
    delta: np.ndarray  # [in, out]

    def directions(self, matrix: str) -> np.ndarray:
        """The input directions of A or of the update, `[in, r]`."""
        rank = self.a.shape[1]
        return input_directions(self.a if matrix == "A" else self.delta)[:, :rank]


Updates = Mapping[tuple[int, int, str], Update]  # by rank, seed and kernel


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes the files of this module to `results`."""
    del experiment
    updates = read_updates(study)
    lines = list(_overlaps(updates))
    write_csv(results / "phi.csv", list(lines[0]), lines)
    rows = list(_amplifications(updates))
    write_csv(results / AMPLIFICATIONS, list(rows[0]), rows)
    write_bytes(results / "phi.png", plot(lines))


def read_updates(study: StudyFolder) -> Updates:
    """The middle layer's kernels of all runs of the final phase."""
    updates = {}
    for cell in study.cells:
        model = load.load_adapted(study.run_path(cell.key) / ADAPTER, cell.config["model"]["name"])
        attention = model.params["layers"]["attn"]
        for kernel in KERNELS:
            form = attention[kernel]["kernel"]
            weight, layer = np.asarray(materialize(form.base)), form.a.shape[0] // 2
            arrays = weight, np.asarray(form.a), np.asarray(form.delta())
            rank = cell.config["method"]["rank"]
            updates[rank, cell.config["seed"], kernel] = Update(*(array[layer] for array in arrays))
    return updates


def _overlaps(updates: Updates) -> Iterator[dict[str, Any]]:
    """phi between two ranks, between two seeds, and between two matrices of chance."""
    ranks = sorted({rank for rank, _, _ in updates})
    narrow, wide = (NARROW, WIDE) if {NARROW, WIDE} <= set(ranks) else (ranks[0], ranks[-1])
    rng = np.random.default_rng(0)
    for kernel in KERNELS:
        first, second = (updates[wide, seed, kernel] for seed in SEEDS)
        for matrix in MATRICES:
            ours = first.directions(matrix)
            pairs = {
                f"r = {narrow} and r = {wide}": (updates[narrow, SEEDS[0], kernel].directions(matrix), ours),
                f"two seeds, r = {wide}": (ours, second.directions(matrix)),
                CHANCE: [input_directions(rng.standard_normal(ours.shape)) for _ in SEEDS],
            }
            for pair, (left, right) in pairs.items():
                for i in _sizes(left.shape[1]):
                    for j in _sizes(right.shape[1]):
                        value = phi(left, right, i, j)
                        yield {"kernel": kernel, "of": matrix, "pair": pair, "i": i, "j": j, "phi": value}


def _sizes(rank: int) -> list[int]:
    """1, 2, 4, and so on, up to the rank."""
    return [2**k for k in range(rank.bit_length()) if 2**k <= rank]


def _amplifications(updates: Updates) -> Iterator[dict[str, Any]]:
    """The columns of the paper's Table 7 for each rank and kernel, as means over the seeds."""
    groups = collections.defaultdict(list)
    for (rank, seed, kernel), update in updates.items():
        rng = np.random.default_rng(seed)
        groups[kernel, rank].append(amplification(update.weight, update.delta, rank, rng))
    for (kernel, rank), norms in groups.items():
        factors = [each.factor for each in norms]
        means = {name: statistics.fmean(getattr(each, name) for each in norms) for name in norms[0]._fields}
        factor = {"factor": statistics.fmean(factors), "factor_ci95": interval(factors)}
        yield {"kernel": kernel, "rank": rank, "seeds": len(norms), **means, **factor}


def amplification_table(experiment: Experiment, results: Path) -> str:
    """`amplification.csv` in Markdown, beside the paper's figures."""
    del experiment
    norms = (f"W in {where}" for where in ("directions of ΔW", "directions of W", "random directions"))
    head = ["kernel", "rank", "W", "ΔW", *norms, "factor"]
    lines: list[Sequence[str]] = [PRINTED]
    for row in read_rows(results / AMPLIFICATIONS):
        factor = format_mean(as_number(row["factor"]), as_number(row["factor_ci95"]))
        figures = (f"{float(row[name]):.3g}" for name in Amplification._fields)
        lines.append([f"MiniLM's {row['kernel']}", row["rank"], *figures, factor])
    return f"Frobenius norms in the middle layer, means over the seeds:\n\n{markdown_table(head, lines)}"


def plot(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """phi of A and of dW of the queries: a heat map for each pair, all on one scale, as PNG."""
    pairs = list(dict.fromkeys(line["pair"] for line in lines))
    highest = max(line["phi"] for line in lines)
    figure, panels = plotting.make_figure(rows=2, columns=len(pairs), width=3.4, height=2.9)
    for axes, (matrix, pair) in zip(panels, [(m, p) for m in MATRICES for p in pairs], strict=True):
        found = {(x["i"], x["j"]): x["phi"] for x in lines if (x["kernel"], x["of"], x["pair"]) == ("q", matrix, pair)}
        i, j = (sorted({key[side] for key in found}) for side in (0, 1))
        values = [[found[row, column] for column in j] for row in i]
        plotting.draw_heat_map(axes, values, list(map(str, i)), list(map(str, j)), 0.0, highest)
        axes.set_title(f"{matrix} of q: {pair}")
        axes.set_ylabel("i")
        axes.set_xlabel("j")
    return plotting.to_png(figure)
