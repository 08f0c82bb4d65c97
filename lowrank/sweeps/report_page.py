"""The page of a study, `report.html`: one file that opens from disk and asks no other site for anything."""

import math
from collections.abc import Sequence

import jinja2

from lowrank.core.files import write_text
from lowrank.core.paths import AnyPath
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.sweeps.status import remark
from lowrank.sweeps.tables import note, table_cells, table_rows

PAGE = "report.html"
TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{{ name }}</title>
<style>
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
  table { border-collapse: collapse; border-block: 2px solid; margin-block: 1rem }
  th { border-bottom: 1px solid; cursor: pointer; text-align: left; white-space: nowrap }
  th[aria-sort=ascending]::after { content: " ▲" }
  th[aria-sort=descending]::after { content: " ▼" }
  th, td { padding: .2rem .8rem; vertical-align: top }
  td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
</style>
<h1>{{ name }}</h1>
<p>{{ metric }} ({{ "lower" if mode == "min" else "higher" }} is better). A click on a heading sorts.</p>
{%- for head, rows in tables %}
<table>
<thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr>{% for cell in row %}<td{% if cell is number_like %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
{%- if loop.first %}
<p>{{ note }}</p>
{%- endif %}
{%- endfor %}
<script>
const value = cell => {
  const text = cell.textContent.replaceAll(",", ""), number = parseFloat(text)
  return Number.isNaN(number) ? text : number
}
const before = (a, b) => typeof a == typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a == "number" ? -1 : 1
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], sign = head.ariaSort == "ascending" ? -1 : 1
  for (const other of head.parentNode.cells) other.ariaSort = null
  head.ariaSort = sign == 1 ? "ascending" : "descending"
  const at = row => value(row.cells[head.cellIndex])
  body.append(...[...body.rows].sort((a, b) => sign * before(at(a), at(b))))
}
</script>
"""
HEAD = ["cell", "point", "state", "score", "seconds", "code", "remark"]


def write_page(study: StudyFolder, results: Sequence[Result], folder: AnyPath | None = None) -> AnyPath:
    """Writes `report.html` in `folder`, by default the study's: the table, and a row for each cell."""
    rows = table_rows(study, results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.tests["number_like"] = lambda text: text[:1].lstrip("-").isdigit() or text[1:2].isdigit()
    tables = [table_cells(study, rows), (HEAD, [_cells(result) for result in results])]
    facts = {"name": study.name, "metric": study.metric, "mode": study.mode, "note": note(study, rows)}
    page = environment.from_string(TEMPLATE).render(**facts, tables=tables)
    return write_text((folder or study.path) / PAGE, page)


def _cells(result: Result) -> list[str]:
    last, seconds = result.history.last, result.summary.get("seconds")
    score = "" if math.isnan(result.score) else f"{result.score:.4g}"
    took = "" if seconds is None else f"{seconds:.1f}"
    return [result.cell.key, result.cell.label, result.state, score, took, str(last.get("code", "")), remark(result)]
