"""The tables of the study: a row for each way to the longer context, perplexity by position, and retrieval."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.long_context.sizes import Size
from experiments.protocol.experiment import PLOT_FILE, TABLE_FILE
from experiments.protocol.table import NOT_RUN, read_rows
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_bytes
from lowrank.evaluation import long_context
from lowrank.sweeps.tables import markdown_table, write_csv

BASE, SEEDS = "base", 1
ENOUGH = 0.9  # of the pass keys within its own context, which the base must find for the heat maps
POSITIONS_FILE, RETRIEVAL_FILE, HEAT_FILE = "positions.csv", "retrieval.csv", "retrieval.png"


def base_found(scores: Mapping[str, Any], size: Size) -> float:
    """The share of the pass keys that a model finds within the base's context."""
    found = [cell["found"] for cell in scores["cells"] if cell["length"] <= size.length]
    return sum(found) / len(found) if found else math.nan


def write_tables(size: Size, folder: Path, results: Path) -> None:
    """Writes the tables and plots. Raises UserError for a model that has not been scored."""
    found: dict[str, Any] = {}
    for name, file in [(BASE, BASE), *((way.name, way.file) for way in size.ways)]:
        if not (path := folder / f"{file}.json").exists():
            raise UserError(f"{path} is missing: run the study with --workers=1, which computes it")
        found[name] = read_json(path)
    results.mkdir(parents=True, exist_ok=True)
    rows = [{"way": name, "seeds": SEEDS, **_row(of, size)} for name, of in found.items()]
    write_csv(results / TABLE_FILE, list(rows[0]), rows)
    positions = [{"way": name, "seeds": SEEDS, **row} for name, of in found.items() for row in of["positions"]]
    write_csv(results / POSITIONS_FILE, list(positions[0]), positions)
    cells = [{"way": name, "seeds": SEEDS, **cell} for name, of in found.items() for cell in of["cells"]]
    write_csv(results / RETRIEVAL_FILE, list(cells[0]), cells)
    write_bytes(results / PLOT_FILE, _plot(found))
    if len({cell["way"] for cell in cells}) > 1:
        write_bytes(results / HEAT_FILE, _heat_maps(found))


def _row(of: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Perplexities at the old context and in the last bin of the new one, and the pass keys found in both."""
    beyond = [cell["found"] for cell in of["cells"] if cell["length"] > size.length]
    last = of["positions"][-1]
    return {
        "context": last["last"],
        "old_perplexity": math.exp(of["old"]),
        "last_perplexity": last["perplexity"],
        "found_within": base_found(of, size),
        "found_beyond": sum(beyond) / len(beyond) if beyond else math.nan,
    }


def _plot(found: Mapping[str, Any]) -> bytes:
    """Perplexity by position of every model."""
    figure, [axes] = plotting.make_figure(width=6.4)
    for i, (name, of) in enumerate(found.items()):
        middles = [(row["first"] + row["last"]) / 2 for row in of["positions"]]
        look: dict[str, Any] = {"color": plotting.COLORS[i % 7], "marker": plotting.MARKERS[i % 7]}
        axes.plot(middles, [row["perplexity"] for row in of["positions"]], label=name, linewidth=1.2, **look)
    axes.set_yscale("log")
    axes.set_xlabel("tokens that a prediction sees")
    axes.set_ylabel("perplexity")
    axes.legend()
    return plotting.to_png(figure)


def _heat_maps(found: Mapping[str, Any]) -> bytes:
    """The share of pass keys found by depth and length, a panel for each way."""
    ways = [(name, of["cells"]) for name, of in found.items() if name != BASE]
    figure, panels = plotting.make_figure(rows=-(-len(ways) // 3), columns=3, width=3.2, height=2.4)
    for axes, (name, cells) in zip(panels, ways, strict=False):
        lengths, depths, shares = long_context.grid([long_context.Cell(**cell) for cell in cells])
        plotting.draw_heat_map(axes, shares, [f"{d:g}" for d in depths], [str(n) for n in lengths], 0.0, 1.0)
        axes.set_title(name)
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth")
    for axes in panels[len(ways) :]:
        axes.set_axis_off()
    return plotting.to_png(figure)


def markdown(results: Path) -> str:
    """The table for the README, with the sentence that it supports."""
    if not (results / TABLE_FILE).exists():
        return NOT_RUN
    rows = read_rows(results / TABLE_FILE)
    head = [
        "way",
        "context",
        "seeds",
        "perplexity, old context",
        "perplexity, last positions",
        "found within",
        "beyond",
    ]
    return f"{markdown_table(head, map(_cells, rows))}\n\n**{conclusion(rows)}**"


def _cells(row: Mapping[str, str]) -> list[str]:
    numbers = [f"{float(row[key]):.2f}" for key in ("old_perplexity", "last_perplexity")]
    shares = ["-" if row[key] == "nan" else f"{float(row[key]):.0%}" for key in ("found_within", "found_beyond")]
    return [row["way"], row["context"], row["seeds"], *numbers, *shares]


def conclusion(rows: Sequence[Mapping[str, str]]) -> str:
    """How many pass keys the base finds within its context, and which way has the least perplexity at the new one."""
    base, *ways = rows
    best = min(ways, key=lambda row: float(row["last_perplexity"]))
    found = f"Within its own context the base finds {float(base['found_within']):.0%} of the pass keys"
    enough = "" if float(base["found_within"]) >= ENOUGH else f", fewer than {ENOUGH:.0%}, so that no way is asked"
    last = f"{float(best['last_perplexity']):.2f}, is that of {best['way']}"
    return f"{found}{enough}. The least perplexity of the last positions, {last}."
