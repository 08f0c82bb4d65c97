"""The report of a run in stages: the scores of every stage in one table, and the state of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lowrank.core import files
from lowrank.core.errors import plural
from lowrank.core.paths import AnyPath, exists
from lowrank.training import loop, report
from lowrank.training.log import METRICS, read_metrics

HEAD = ("stage", "start", "objective", "method", "steps", "metric", "before", "after")
FACTS = ("model", "method", "steps", "steps_done", "final_loss", "seconds", "before", "after")


def write(folder: AnyPath, stages: Sequence[Any], command: str) -> dict[str, Any]:
    """Writes `summary.json` and `report.md` of all stages into `folder`; returns the summary."""
    summary = {"stages": [_facts(stage) for stage in stages]}
    if jax.process_index() == 0:
        text = [f"# {plural(len(stages), 'stage')}", report.fenced(command, "sh") if command else ""]
        text += [report.table(HEAD, rows(summary["stages"])), "Each stage has a report of its own:"]
        text += ["\n".join(f"- [{s.name}]({s.folder.name}/report.md)" for s in stages)]
        files.write_text(folder / "report.md", "\n\n".join(part for part in text if part) + "\n")
        files.write_json(folder / loop.SUMMARY, summary)
    return summary


def _facts(stage: Any) -> dict[str, Any]:
    summary = files.read_json(stage.folder / loop.SUMMARY)
    objective = stage.config.get("objective", "causal_lm")
    kept = {key: summary[key] for key in FACTS if key in summary}
    return {"name": stage.name, "start": stage.start, "objective": _label(objective), **kept}


def _label(objective: Any) -> str:
    """The name of an objective, and that of its loss where it has one."""
    if not isinstance(objective, Mapping):
        return str(objective)
    return " ".join(str(objective[key]) for key in ("name", "loss") if key in objective)


def rows(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each score of each stage, and one for a stage without any."""
    found = list[tuple[str, ...]]()
    for i, stage in enumerate(facts):
        before, after = stage.get("before") or {}, stage.get("after") or {}
        start = stage["start"] if i else ""
        head: tuple[str, ...] = (
            stage["name"],
            start,
            stage["objective"],
            stage["method"],
            str(stage.get("steps_done", "")),
        )
        for metric in dict.fromkeys([*before, *after]) or [""]:
            found.append((*head, metric, *(_number(scores.get(metric)) for scores in (before, after))))
            head = ("",) * len(head)
    return found


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def status(folder: AnyPath, stages: Sequence[Any]) -> str:
    """The state of every stage, and the scores of those that have ended."""
    lines = [(stage.name, *_state(stage)) for stage in stages]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    text = "\n".join(
        "  ".join((line[0].ljust(widths[0]), line[1].ljust(widths[1]), line[2])).rstrip() for line in lines
    )
    return f"{plural(len(lines), 'stage')} in {folder}\n\n{text}"


def _state(stage: Any) -> tuple[str, str]:
    """`(state, scores)` of a stage."""
    if stage.done:
        after = files.read_json(stage.folder / loop.SUMMARY).get("after") or {}
        return "done", ", ".join(f"{name} {_number(value)}" for name, value in after.items())
    log = stage.folder / METRICS
    if not exists(log):
        return "not begun", ""
    steps = [line["step"] for line in read_metrics(log)]
    return f"step {int(max(steps, default=0))} of {stage.config['steps']}", ""
