"""Rewrites the tables of README.md and docs/ from result files: `python -m experiments.tables`, or `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

import csv
import functools
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.bench import page
from experiments.bench.step_cases import CASES
from experiments.bench.tpu_cases import TOPOLOGIES, Case, attention_cases, cases, model_cases
from experiments.federated import table as federated
from experiments.intrinsic_dimension import table as dimensions
from experiments.long_context import table as long_context
from experiments.merging import table as merges
from experiments.objectives import command as objectives
from experiments.protocol import table as study_table
from experiments.protocol.marks import earlier_mark, same_mark
from lowrank.core.files import write_text
from lowrank.memory.report import format_bytes
from lowrank.sweeps.tables import format_mean, markdown_table

ROOT = Path(__file__).parents[1]
READMES = sorted((ROOT / "experiments").glob("*/README.md"))
PAGES = (ROOT / "README.md", *READMES, *sorted((ROOT / "docs").rglob("*.md")))
STUDIES = [path.parent.name for path in READMES if (path.parent / "study.py").exists()]
# Nine methods to start from, each a row of the study, and the reason to take it.
FIRST_CHOICES = {
    "lora": "The default: it merges into the base, every tool reads it, and it works on quantized bases.",
    "dora": "LoRA falls short at a low rank: magnitude and direction are learned apart.",
    "rslora": "The rank is large: the scale falls with its square root, and the update does not vanish.",
    "pissa": "The run is short: the adapter starts from the kernels' largest singular vectors.",
    "vera": "Many adapters are kept or sent: each one is a few vectors per kernel.",
    "ia3": "There are few examples and little memory: one vector per kernel is trained.",
    "sparse": "The model should forget little: a few entries of each kernel are trained.",
    "houlsby": "Capacity matters more than merging: a bottleneck network is added after each sublayer.",
    "full": "Memory is plentiful, and an upper bound of quality is wanted.",
}

TITLES = {"lora": "LoRA", "dora": "DoRA"}
LORA = "minus_lora"  # the differences of the methods' table


def bench_step() -> str:
    """The step beside peft's on every processor, from `experiments/bench/results/step.json`."""
    head = (
        "| | ours, s/step | peft, s/step | peft / ours | products / ours | ours, peak MB | peft, peak MB | first step |"
    )
    lines = []
    for processor, results in _json("experiments/bench/results/step.json").items():
        lines.append(f"| **{processor}** | | | | | | | ours, ours compiled before / peft |")
        for case in (case for case in CASES if case.name in results):
            r = results[case.name]
            again = f"{r['ours_first_step_cached_s']:.1f}" if "ours_first_step_cached_s" in r else "-"
            lines.append(
                f"| {TITLES[case.method]} {case.precision} "
                f"| {r['ours_s']:.2f} | {r['peft_s']:.2f} | **{r['ratio']:.2f}** | {r['share_of_limit']:.2f} "
                f"| {r['ours_rss_mb']:.0f} | {r['peft_rss_mb']:.0f} "
                f"| {r['ours_first_step_s']:.1f}, {again} / {r['peft_first_step_s']:.1f} |"
            )
    return "\n".join([head, "|---|" + "---:|" * 7, *lines])


def bench_ratios() -> str:
    """The time of peft's step over that of ours, a column for each processor, from `results/step.json`."""
    by_processor = _json("experiments/bench/results/step.json")
    rows = [
        [f"{TITLES[case.method]} {case.precision}", *(_step_ratio(r.get(case.name)) for r in by_processor.values())]
        for case in CASES
    ]
    return markdown_table(["peft / ours", *by_processor], rows)


def _step_ratio(r: dict[str, Any] | None) -> str:
    return f"**{r['ratio']:.2f}**: {r['peft_s']:.2f} / {r['ours_s']:.2f} s" if r else ""


def bench_answers() -> str:
    """A loss on answers alone beside peft's, from `experiments/bench/results/answers.json`."""
    r = _json("experiments/bench/results/answers.json")
    ours = (f"ours, `logits_chunk_tokens={n}`" for n in (0, 128))
    head = f"| tokens with weight | peft, s/step | {' | '.join(ours)} | peft / ours |"
    row = f"| {r['answers']:.0%} | {r['peft']:.2f} | {r['0']:.2f} | {r['128']:.2f} | **{r['peft'] / r['128']:.2f}** |"
    return f"{head}\n{'|---:' * 5}|\n{row}"


def bench_preference() -> str:
    """A step on pairs beside a supervised one on the same tokens, from `experiments/bench/results/preference.json`."""
    r = _json("experiments/bench/results/preference.json")
    rows = [[side, f"{seconds:.2f}", f"**{r['ratio'][side]:.2f}**"] for side, seconds in r["seconds"].items()]
    return markdown_table(["objective", "s/step", "times supervised"], rows)


def nf4() -> str:
    """NF4 beside bitsandbytes', from `experiments/bench/results/nf4.json`."""
    head = "| kernel | double | error, ours / bitsandbytes | quantize, ms | dequantize, ms | 512 rows times it, ms |"
    both = lambda pair, form: f"{pair['ours']:{form}} / {pair['bitsandbytes']:{form}}"  # noqa: E731
    rows = [
        f"| {r['kernel']}, {r['shape'][0]} x {r['shape'][1]} | {'yes' if r['double'] else 'no'} "
        f"| {both(r['error'], '.4f')} | {both(r['quantize'], '.2f')} | {both(r['dequantize'], '.2f')} "
        f"| {both(r['matmul'], '.2f')} |"
        for name, r in _json("experiments/bench/results/nf4.json").items()
        if name != "machine"
    ]
    return "\n".join([head, "|---|---|" + "---:|" * 4, *rows])


def tpu_steps() -> str:
    """The steps of each method as a TPU's compiler makes them, or by formula alone, from `results/tpu.json`."""
    head = "| base, method | mesh | arguments | temporaries | in all | by formula | its collectives move | |"
    rows = []
    for case, r in _tpu_results():
        if case.required and "needed" in r:
            compiled, moved = r.get("compiled", {}), sum(size for _, size in r.get("collectives", {}).values())
            sizes = (
                *(compiled.get(part, 0) for part in ("arguments", "temporary", "total")),
                r["formula"]["peak"],
                moved,
            )
            axes = ", ".join(f"{axis} {size}" for axis, size in case.mesh.items() if size > 1)
            cells = " | ".join(format_bytes(size) if size else "" for size in sizes)
            rows.append(f"| {case.base}, {case.method} | {case.topology}: {axes} | {cells} | {_verdict(r)} |")
    return "\n".join([head, "|---|---|" + "---:|" * 5 + "---|", *rows])


def tpu_attention() -> str:
    """LoRA at four lengths on four slices, from `experiments/bench/results/tpu.json`."""
    wanted, cells = {case.key for case in attention_cases()}, dict[str, dict[int, str]]()
    for case, r in _tpu_results():
        if case.key in wanted and "needed" in r:
            axes = ", ".join(f"{axis} {size}" for axis, size in case.mesh.items() if size > 1)
            rows = f"{case.rows} row{'s' if case.rows > 1 else ''}, {axes}"
            needed = f"{format_bytes(r['needed'])} ({'compiled' if 'compiled' in r else 'formula'})"
            cells.setdefault(case.topology, {})[case.length] = f"{rows}: {needed}, {_verdict(r)}"
    lengths = sorted({length for row in cells.values() for length in row})
    head = f"| slice | {' | '.join(f'{n // 1024}k tokens' for n in lengths)} |"
    rows = [f"| {name} | {' | '.join(row.get(n, '') for n in lengths)} |" for name, row in cells.items()]
    return "\n".join([head, "|---|" + "---:|" * len(lengths), *rows])


def tpu_models() -> str:
    """Four models and four methods on four slices, from `experiments/bench/results/tpu.json`."""
    results, cells = _json("experiments/bench/results/tpu.json"), dict[tuple[str, str], dict[str, str]]()
    for case in model_cases():
        if "needed" in (r := results.get(case.key, {})):
            needed = f"{format_bytes(r['needed'])}{', compiled' if 'compiled' in r else ''}"
            cells.setdefault((case.base, case.method), {})[case.topology] = needed if r["fits"] else f"**{needed}**"
    rows = [f"| {base}, {of} | {' | '.join(row.get(t, '') for t in TOPOLOGIES)} |" for (base, of), row in cells.items()]
    return "\n".join([f"| base, method | {' | '.join(TOPOLOGIES)} |", "|---|" + "---:|" * len(TOPOLOGIES), *rows])


def _verdict(r: dict[str, Any]) -> str:
    """Whether a planned run fits; where it does not, the largest part of its memory by formula."""
    if r["fits"]:
        return "fits"
    parts = {name: size for name, size in r["formula"].items() if name != "peak"}
    parts["temporaries"] = r["formula"]["peak"] - sum(parts.values())
    most = max(parts, key=lambda name: parts[name])
    return f"does not fit: {most} of {format_bytes(parts[most])}"


def _tpu_results() -> list[tuple[Case, dict[str, Any]]]:
    """The cases that are in the results, in their order."""
    results = _json("experiments/bench/results/tpu.json")
    return [(case, results[case.key]) for case in cases() if case.key in results]


def quickstart() -> str:
    """The quickstart's scores, from `experiments/quickstart/results/summary.json`."""
    s = _json("experiments/quickstart/results/summary.json")
    head = "| | ROUGE-L before | ROUGE-L after | trained parameters | of all | seconds on 2 cores |"
    row = (
        f"| SmolLM2-135M, LoRA | {s['rougeL_before']:.3f} | **{s['rougeL_after']:.3f}** | {s['trained_params']:,} "
        f"| {100 * s['trained_params'] / s['total_params']:.2f} % | {s['seconds']:.0f} |"
    )
    return "\n".join([head, "|---|" + "---:|" * 5, row])


def counts() -> str:
    """Trained parameters beside what papers print, from `experiments/counts/results/counts.json`."""
    rows = [
        f"| {r['model']} | {r['method']} | {r['trained_params']:,} | {r['trained_percent']:.3g} % "
        f"| {r['printed']} ({r['source']}) |"
        for r in _json("experiments/counts/results/counts.json")
    ]
    return "\n".join(["| | | trained parameters | of all | printed |", "|---|---|---:|---:|---|", *rows])


def plan() -> str:
    """The memory report of a run that does not fit, from `experiments/plan/results/t4.txt`."""
    return f"```\n{(ROOT / 'experiments/plan/results/t4.txt').read_text()}```"


def methods() -> str:
    """Every method's trained parameters, cost and scores, from `experiments/methods/results`."""
    entries = _json("experiments/methods/results/catalogue.json")
    scored = {(row["method"], row["task"]): row for row in _csv("experiments/methods/results/table.csv")}
    head = "| row | config | what it is | family | merges | trained, SmolLM2-135M "
    head += "| topics, accuracy | s/step | headlines, perplexity | s/step |"
    rows = [
        f"| `{name}` | `{e['config']}` | {e['trains']} | {e['family']} | {'yes' if e['merges'] else 'no'} "
        f"| {'-' if e['trained_params'] is None else format(e['trained_params'], ',')} "
        f"| {_score(scored.get((name, 'topics')), LORA)} | {_score(scored.get((name, 'headlines')), LORA)} |"
        for name, e in entries.items()
    ]
    return "\n".join([head, "|---|---|---|---|---|---:|---:|---:|---:|---:|", *rows])


def first_choices() -> str:
    """The methods of `FIRST_CHOICES` with their figures, from `experiments/methods/results`."""
    entries = _json("experiments/methods/results/catalogue.json")
    scored = {(row["method"], row["task"]): row for row in _csv("experiments/methods/results/table.csv")}
    rows = [
        f"| `{entries[name]['config']}` | {reason} | {entries[name]['trained_params']:,} "
        f"| {_score(scored.get((name, 'topics')), LORA)} |"
        for name, reason in FIRST_CHOICES.items()
    ]
    return "\n".join(["| config | take it when | trained | accuracy | s/step |", "|---|---|---:|---:|---:|", *rows])


def quantization() -> str:
    """Every base, untuned and with each method on it, from `experiments/quantization/results/table.csv`."""
    found = {(r["base"], r["method"], r["task"]): r for r in _csv("experiments/quantization/results/table.csv")}
    head = "| base | tuned by | bits per weight | topics, accuracy | s/step | headlines, perplexity | s/step |"
    lines = []
    for base, method in dict.fromkeys(key[:2] for key in found):
        topics, headlines = (found.get((base, method, task)) for task in ("topics", "headlines"))
        bits = float((topics or headlines)["bits_per_weight"])
        scores = " | ".join(_score(row, "minus_float32") for row in (topics, headlines))
        lines.append(f"| {base} | {method} | {bits:.2f} | {scores} |")
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---:|", *lines])


def study(name: str) -> str:
    """The table of a study with its conclusion, from `experiments/NAME/results`."""
    experiment = importlib.import_module(f"experiments.{name}.study").EXPERIMENT
    return study_table.markdown(experiment, ROOT / "experiments" / name / "results") + _pictures(name)


def _pictures(study: str) -> str:
    """The plots among a study's results, for its README."""
    plots = sorted((ROOT / "experiments" / study / "results").glob("*.png"))
    return "".join(f"\n\n![{plot.stem}](results/{plot.name})" for plot in plots)


def _score(row: dict[str, str] | None, difference: str) -> str:
    """`mean ± interval, marks | seconds per step`; dashes for a cell that was not run. `difference` as in `marks`."""
    if row is None:
        return "- | -"
    step = "-" if row["step_s"] == "nan" else f"{float(row['step_s']):.2f}"
    score = format_mean(float(row["score_mean"]), float(row["score_ci95"]))
    return f"{score}{same_mark(row, difference)}{earlier_mark(row)} | {step}"


TABLES: dict[str, Callable[[], str]] = {
    "bench/answers": bench_answers,
    "bench/nf4": nf4,
    "bench/page": page.table,
    "bench/preference": bench_preference,
    "bench/ratios": bench_ratios,
    "bench/step": bench_step,
    "counts": counts,
    "methods": methods,
    "methods/first_choices": first_choices,
    "plan": plan,
    "quantization": quantization,
    "quickstart": quickstart,
    "tpu/attention": tpu_attention,
    "tpu/models": tpu_models,
    "tpu/steps": tpu_steps,
    **{f"studies/{name}": functools.partial(study, name) for name in STUDIES},
    "studies/federated": lambda: federated.markdown(ROOT / "experiments/federated/results") + _pictures("federated"),
    "studies/long_context": lambda: (
        long_context.markdown(ROOT / "experiments/long_context/results") + _pictures("long_context")
    ),
    "studies/merging": lambda: merges.markdown(ROOT / "experiments/merging/results") + _pictures("merging"),
    "studies/objectives": lambda: (
        objectives.markdown(ROOT / "experiments/objectives/results") + _pictures("objectives")
    ),
    "studies/intrinsic_dimension": lambda: (
        dimensions.markdown(dimensions.search.results_folder("small")) + _pictures("intrinsic_dimension")
    ),
}


def with_tables(text: str) -> str:
    """`text` with every marked table made anew. Raises KeyError for a name that is not in TABLES."""

    def table(marked: re.Match[str]) -> str:
        return f"<!-- table: {marked[1]} -->\n{TABLES[marked[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def rewrite(path: Path) -> None:
    """Makes the marked tables of a page anew."""
    write_text(path, with_tables(path.read_text()))


def _json(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text())


def _csv(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / path).read_text().splitlines()))


if __name__ == "__main__":
    for page_path in PAGES:
        rewrite(page_path)
