"""The report of a finished run: `report.md` and `loss.png`, written from its log and its summary."""

import io
import json
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lowrank.core.files import to_json, write_bytes, write_text
from lowrank.core.paths import AnyPath, PathLike, as_path, exists, size
from lowrank.training.log import LOSS, METRICS, read_metrics

EVAL = "eval/"
_SKIPPED = ("before", "after", "samples")  # keys of a summary that have a section of their own


def write(
    workdir: PathLike,
    summary: Mapping[str, Any],
    rules: str = "",
    *,
    title: str = "Fine-tuning run",
    command: str = "",
    config: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    files: Mapping[str, str] | None = None,
) -> AnyPath:
    """Writes `report.md`, and `loss.png` where `metrics.jsonl` has losses, into `workdir`; returns the report's path.

    Args:
      workdir: the folder of the run.
      summary: the facts of the run. `before` and `after` map metric names to values and are shown side by side; the
        values of keys that end in `seconds`, `_bytes`, `_percent` or `_params` are shown in these units.
      rules: the table that `lowrank.core.parameter_summary.rule_table` returns.
      title: the heading of the page.
      command: the shell command that repeats the run.
      config: the config of the run.
      samples: per sample, heading -> text, for instance prompt, reference, before, after.
      files: path (absolute, or relative to `workdir`) -> description; the report adds their sizes.
    """
    workdir = as_path(workdir)
    plot = plot_losses(workdir)
    parts = [
        f"# {title}",
        fenced(command, "sh") if command else "",
        _comparison(summary.get("before") or {}, summary.get("after") or {}),
        f"![Loss by step]({plot.name})" if plot else "",
        _section("The run", _facts(summary)),
        _section("Trained parameters", fenced(rules) if rules else ""),
        _section("Samples", "\n\n".join(_sample(i, s) for i, s in enumerate(samples, 1))),
        _section("Files", _files(workdir, files or {})),
        _section("Config", fenced(json.dumps(to_json(config), indent=2), "json") if config else ""),
    ]
    return write_text(workdir / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def plot_losses(workdir: PathLike) -> AnyPath | None:
    """Draws `loss.png` from the `metrics.jsonl` of `workdir`; returns None if no finite loss was logged."""
    path = as_path(workdir) / METRICS
    lines = read_metrics(path) if exists(path) else []
    names = dict.fromkeys(key for line in lines for key in line if key.startswith(EVAL) and key.endswith("/loss"))
    train, held_out = _series(lines, LOSS), {name: _series(lines, name) for name in names}
    if not len(train) and not any(map(len, held_out.values())):
        return None
    from matplotlib.figure import Figure  # here, as the import takes half a second; without pyplot's global state

    figure = Figure(figsize=(7.2, 4.4), dpi=150)
    axes = figure.add_axes((0.12, 0.11, 0.86, 0.86))
    _draw(axes, train, held_out)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return write_bytes(path.parent / "loss.png", png.getvalue())


def logged_name(score: str) -> str:
    """The name under which the log has a score of held-out data: `nll` is `eval/loss`, `old/nll` is `eval/old/loss`."""
    source, slash, name = score.rpartition("/")
    return f"{EVAL}{source}{slash}{'loss' if name == 'nll' else name}"


def peak_memory() -> dict[str, int]:
    """`peak_host_bytes` of this process and, where the device reports it, `peak_device_bytes` of its fullest device."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"peak_host_bytes": _peak_host_bytes()} | ({"peak_device_bytes": max(peaks)} if peaks else {})


def _peak_host_bytes() -> int:
    status = Path("/proc/self/status")
    # On Linux, ru_maxrss starts at the size of the parent process, so it is not used there.
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if peak:
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """`[N]`: the mean of each of the values `[N]` and up to `window - 1` values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """`[N, 2]`: the step and the value of each line whose value is finite."""
    points = [(line["step"], line[key]) for line in lines if key in line and np.isfinite(line[key])]
    return np.array(points, np.float64).reshape(-1, 2)


def _draw(axes: Any, train: np.ndarray, held_out: Mapping[str, np.ndarray]) -> None:
    window = max(1, len(train) // 20)
    if len(train):
        axes.plot(*train.T, color="tab:blue", alpha=0.3 if window > 1 else 1, lw=1.2, label="train")
    if window > 1:
        label = f"train, mean of {window} logged values"
        axes.plot(train[:, 0], trailing_mean(train[:, 1], window), color="tab:blue", lw=2, label=label)
    for i, (name, points) in enumerate(held_out.items()):
        source = name.removeprefix(EVAL).removesuffix("loss").rstrip("/")
        axes.plot(*points.T, color=f"C{i + 1}", lw=1.6, marker="o", ms=4.5, label=source or "evaluation")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _section(heading: str, body: str) -> str:
    return f"## {heading}\n\n{body}" if body else ""


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        change = "" if old is None or new is None else f"{float(new) - float(old):+.4g}"
        rows.append((name, *("" if v is None else f"{float(v):.4g}" for v in (old, new)), change))
    return table(("metric", "before", "after", "change"), rows)


def _facts(summary: Mapping[str, Any]) -> str:
    return table(
        ("quantity", "value"), [(name, _value(name, v)) for name, v in summary.items() if name not in _SKIPPED]
    )


def _value(name: str, value: Any) -> str:
    value = to_json(value, name)
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value)
    if name.endswith("seconds"):
        return f"{value:.1f} s" + (f" ({tqdm.format_interval(value)})" if value >= 60 else "")
    if name.endswith("_bytes"):
        return tqdm.format_sizeof(value, "B")
    return f"{value:.4g} %" if name.endswith("_percent") else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, empty without rows."""
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _sample(number: int, sample: Mapping[str, str]) -> str:
    return "\n\n".join([f"### Sample {number}", *(f"**{name}**\n\n{fenced(text)}" for name, text in sample.items())])


def _files(workdir: AnyPath, files: Mapping[str, str]) -> str:
    known = {METRICS: "every logged number", "tensorboard": "the same for TensorBoard", "config.json": "the config"}
    shown = {path: what for path, what in {**files, **known}.items() if exists(workdir / path)}
    sizes = {path: tqdm.format_sizeof(size(workdir / path), "B") for path in shown}
    return table(("path", "size", "what"), [(f"`{path}`", sizes[path], what) for path, what in shown.items()])
