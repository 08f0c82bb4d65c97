"""The files of long-context scores: tables as CSV and Markdown, and heat maps of retrieval."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.files import write_bytes, write_text
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.evaluation.long_context.retrieval import Cell
from lowrank.evaluation.long_context.score import LongScores

RETRIEVAL_FILE, POSITIONS_FILE = "retrieval.csv", "positions.csv"


def write(found: LongScores, folder: PathLike) -> list[AnyPath]:
    """Writes the tables that there are, and a heat map for each task; returns their paths."""
    folder, paths = as_path(folder), list[AnyPath]()
    if found.cells:
        paths.append(write_text(folder / RETRIEVAL_FILE, to_csv([dataclasses.asdict(cell) for cell in found.cells])))
    for task in dict.fromkeys(cell.task for cell in found.cells):
        cells = [cell for cell in found.cells if cell.task == task]
        paths.append(write_text(folder / f"{task}.md", retrieval_table(cells) + "\n"))
        paths.append(write_bytes(folder / f"{task}.png", heat_map(cells)))
    if found.positions:
        paths.append(write_text(folder / POSITIONS_FILE, to_csv(found.positions)))
    return paths


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def grid(cells: Sequence[Cell]) -> tuple[list[int], list[float], list[list[float]]]:
    """`(lengths, depths, found [depth][length])`."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    found = {(cell.depth, cell.length): cell.found for cell in cells}
    return lengths, depths, [[found[depth, length] for length in lengths] for depth in depths]


def retrieval_table(cells: Sequence[Cell]) -> str:
    """The shares that were found as Markdown: a row for each depth, a column for each length."""
    lengths, depths, found = grid(cells)
    head = ["depth", *(f"{n} tokens" for n in lengths)]
    rows = [[f"{depth:g}", *(f"{x:.0%}" for x in row)] for depth, row in zip(depths, found, strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * len(lengths)], *rows))


def heat_map(cells: Sequence[Cell]) -> bytes:
    """The shares that were found, by depth and length, as PNG."""
    from matplotlib.figure import Figure  # half a second, which no other score needs

    lengths, depths, found = grid(cells)
    figure = Figure(figsize=(2.2 + 0.7 * len(lengths), 1.4 + 0.4 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(found, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(f"{cells[0].task}: share found")
    figure.colorbar(image)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
    return png.getvalue()
