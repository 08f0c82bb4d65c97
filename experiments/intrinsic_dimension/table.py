"""The table of the study: d90 of every row over its seeds, beside the paper's."""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.intrinsic_dimension import search
from experiments.intrinsic_dimension.bisection import smallest
from experiments.intrinsic_dimension.search import SHARE, Size
from experiments.protocol.experiment import PLOT_FILE, TABLE_FILE
from experiments.protocol.plot import draw_ranges
from experiments.protocol.table import NOT_RUN, read_rows
from lowrank.core.files import write_bytes
from lowrank.core.paths import AnyPath, exists
from lowrank.sweeps.statistics import holm, interval, is_tied, paired_difference
from lowrank.sweeps.tables import BASELINE, SAME, markdown_table, write_csv

SOURCE = "arXiv:2012.13255, Table 1, MRPC"
FIELDS = ("d90", "low", "high")


def write_table(size: Size, results: AnyPath) -> None:
    """Writes `table.csv` and the plot.

    d90 is the geometric mean over the seeds, with Student's 95 % interval of the mean of its logarithm; the ratio is to
    the first row, seed by seed. Both are empty for a row in which the search of a seed found no dimension large enough.
    """
    found = [dimensions(size, results, i) for i in range(len(size.rows))]
    logs = [{seed: math.log2(d) for seed, d in of.items() if d} for of in found]
    whole = [of if len(of) == size.seeds else {} for of in logs]
    ratios = [paired_difference(of, whole[0]) for of in whole]
    adjusted = holm([math.nan, *(ratio.p for ratio in ratios[1:])])
    lines = [
        {
            **row.labels,
            "seeds": size.seeds,
            "full_accuracy": search.full_accuracy(results, row.model),
            "by_seed": " ".join(str(d or f">{row.candidates[-1]}") for d in of.values()),
            **dict(zip(FIELDS, _range(list(log.values())), strict=True)),
            "ratio": 2.0**ratio.mean,
            "p_holm": p,
            "printed": row.printed,
        }
        for row, of, log, ratio, p in zip(size.rows, found, whole, ratios, adjusted, strict=True)
    ]
    write_csv(results / TABLE_FILE, list(lines[0]), lines)
    rows = read_rows(results / TABLE_FILE)
    write_bytes(results / PLOT_FILE, draw_ranges([_name(row) for row in rows], [_numbers(row) for row in rows], "d90"))


def dimensions(size: Size, results: AnyPath, row: int) -> dict[int, int | None]:
    """d90 of every seed of a row, None where no dimension was large enough."""
    candidates = size.rows[row].candidates
    return {seed: smallest(candidates, search.read_reached(size, results, row, seed)) for seed in range(size.seeds)}


def _range(logs: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of dimensions and the ends of its interval, from base-2 logarithms; NaN for none."""
    if not logs:
        return math.nan, math.nan, math.nan
    mean, half = statistics.fmean(logs), interval(logs)
    return 2**mean, 2 ** (mean - half), 2 ** (mean + half)


def _name(row: Mapping[str, str]) -> str:
    return " · ".join(list(row.values())[:3])


def _numbers(row: Mapping[str, str]) -> tuple[float, float, float]:
    middle, low, high = (float(row[field]) for field in FIELDS)
    return middle, low, high


def markdown(results: AnyPath) -> str:
    """The table for the README with its conclusion."""
    if not exists(results / TABLE_FILE):
        return NOT_RUN
    rows = read_rows(results / TABLE_FILE)
    labels = list(rows[0])[:3]
    head = [*labels, "seeds", "full tuning", "d90 by seed", "d90", "ratio to the first", f"{SOURCE}: d90"]
    text = markdown_table(head, [_cells(row, i) for i, row in enumerate(rows)], 3)
    note = (
        f"d90 is the smallest dimension that reaches {SHARE:.0%} of the accuracy of full tuning, as the geometric mean "
        "over the seeds with the 95 % interval of the mean of its logarithm (Student's t). Every seed searches on its "
        f"own. {SAME} marks a ratio that the seeds cannot tell from 1 (paired t test of the logarithms, corrected by "
        "Holm over the rows)."
    )
    return f"{text}\n\n{note}\n\n**{conclusion(rows)}**"


def _cells(row: Mapping[str, str], index: int) -> list[str]:
    middle, low, high = _numbers(row)
    mark = f" {SAME}" if is_tied(float(row["p_holm"])) else ""
    return [
        *list(row.values())[:3],
        row["seeds"],
        f"{float(row['full_accuracy']):.3f}",
        row["by_seed"],
        "" if math.isnan(middle) else f"{middle:.0f} ({low:.0f} to {high:.0f})",
        BASELINE if index == 0 else "" if math.isnan(float(row["ratio"])) else f"{float(row['ratio']):.2f}{mark}",
        row["printed"],
    ]


def conclusion(rows: Sequence[Mapping[str, str]]) -> str:
    """One sentence that the table supports, or that nothing is decided."""
    first = _name(rows[0])
    told = [row for row in rows[1:] if not is_tied(float(row["p_holm"]))]
    if not told:
        return f"Not decided: these seeds tell no row's d90 from that of {first}."
    parts = [f"{float(row['ratio']):.2f} times in {_name(row)}" for row in told]
    rest = [_name(row) for row in rows[1:] if row not in told]
    return f"Compared with {first}, d90 is {', '.join(parts)}{'; not decided: ' if rest else ''}{', '.join(rest)}."
