"""What a merge did to each tensor and to the whole: distances to the parents, conflicts, cosines, shares trimmed.

A task vector is a model's difference from the base. Without a base, the cosines are those of the weights themselves.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core import files
from lowrank.merging.blocks import blocks, products
from lowrank.merging.model_spec import ModelSpec
from lowrank.merging.rule import Group

CSV, JSON, PLOT = "merge_report.csv", "merge_report.json", "task_vector_cosines.png"


def measure(group: Group) -> dict[str, Any]:
    """`{"gram": inner products of the task vectors, "conflicts": share of entries}` before a rule changes them.

    A conflict is an entry at which two task vectors have opposite signs.
    """
    flat = [x.reshape(-1) for x in group.tensors]
    base = group.base.reshape(-1) if group.base is not None else None
    gram, conflicts = np.zeros((len(flat), len(flat))), 0
    for part in blocks(flat[0].size):
        rows = np.stack([x[part] for x in flat]).astype(np.float64)
        rows = rows if base is None else rows - base[part]
        gram += products(rows)
        conflicts += int(np.count_nonzero((rows > 0).any(0) & (rows < 0).any(0)))
    measured: dict[str, Any] = {"gram": gram.tolist()}
    return measured if base is None else measured | {"conflicts": conflicts / max(1, flat[0].size)}


def squared_distance(merged: np.ndarray, parent: np.ndarray) -> tuple[float, float]:
    """`(||merged - parent||^2, ||parent||^2)` of two arrays, in float64."""
    a, b, gap, size = merged.reshape(-1), parent.reshape(-1), 0.0, 0.0
    for part in blocks(a.size):
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        gap, size = gap + float(np.einsum("n,n", x - y, x - y)), size + float(np.einsum("n,n", y, y))
    return gap, size


def summarize(rows: Sequence[Mapping[str, Any]], sources: Sequence[ModelSpec], based: bool) -> dict[str, Any]:
    """The figures of the whole model. Rows of tensors with other models than `sources` are left out of the cosines."""
    names = [str(source) for source in sources]
    gram = sum((np.array(row["gram"]) for row in rows if row["models"] == names), np.zeros((len(names),) * 2))
    lengths = np.sqrt(np.diag(gram))
    cosines = gram / np.maximum(np.outer(lengths, lengths), 1e-300)
    distances: dict[str, list[float]] = {}
    for row in rows:
        for parent, (gap, size) in row["distances"].items():
            total = distances.setdefault(parent, [0.0, 0.0])
            total[0], total[1] = total[0] + gap, total[1] + size
    entries = sum(row["entries"] for row in rows)
    kept = [row for row in rows if row["kept"]]
    trimmed = (
        [
            1 - sum(row["kept"][i] * row["entries"] for row in kept) / max(1, sum(row["entries"] for row in kept))
            for i in range(len(kept[0]["kept"]))
        ]
        if kept
        else []
    )
    conflicts = sum(row.get("conflicts", 0.0) * row["entries"] for row in rows) / max(1, entries)
    return {
        "relative_distance": {p: (gap / size) ** 0.5 if size else 0.0 for p, (gap, size) in distances.items()},
        "cosines_of": "task vectors" if based else "weights",
        "models": names,
        "cosines": cosines.tolist(),
        "norms": lengths.tolist(),
        **({"sign_conflicts": conflicts} if based else {}),
        **({"share_trimmed": trimmed} if trimmed else {}),
        "entries": entries,
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each tensor: its relative distance to each parent, its conflicts, and the shares trimmed."""
    parents = list(dict.fromkeys(parent for row in rows for parent in row["distances"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tensor", "entries", *(f"distance to {p}" for p in parents), "sign conflicts", "share trimmed"])
    for row in rows:
        pairs = [row["distances"].get(parent) for parent in parents]
        ratios = ["" if not pair else f"{(pair[0] / pair[1]) ** 0.5 if pair[1] else 0.0:.6g}" for pair in pairs]
        conflicts = f"{row['conflicts']:.6g}" if "conflicts" in row else ""
        trimmed = " ".join(f"{1 - share:.6g}" for share in row["kept"])
        writer.writerow([row["name"], row["entries"], *ratios, conflicts, trimmed])
    return text.getvalue()


def write(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Writes the report's files into a folder."""
    (folder / CSV).write_text(to_csv(rows), encoding="utf-8")
    files.write_json(folder / JSON, summary)
    if len(summary["models"]) > 1:
        _plot(folder / PLOT, summary)


def _plot(path: Path, summary: Mapping[str, Any]) -> None:
    """The cosine matrix as a picture."""
    from matplotlib.figure import Figure  # half a second, which no other command of this room needs

    n = len(summary["models"])
    names = [name.rstrip("/").rpartition("/")[2] for name in summary["models"]]
    figure = Figure(figsize=(2.5 + 0.7 * n, 2 + 0.7 * n), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(summary["cosines"], vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(n), names, rotation=45, ha="right")
    axes.set_yticks(range(n), names)
    axes.set_title(f"cosines of {summary['cosines_of']}")
    for i in range(n):
        for j in range(n):
            value = summary["cosines"][i][j]
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
