"""Rewrites the README's tables from result files: `python -m experiments.tables`, or `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.study.numbers import spelled

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def bench_step() -> str:
    """The step beside peft's, from `experiments/bench/results/step.json`."""
    results = _json("experiments/bench/results/step.json")
    head = "| | ours, s/step | peft, s/step | peft / ours | ours, peak MB | peft, peak MB | first step, ours / peft |"
    rows = [
        f"| {name} | {r['ours_s']:.2f} | {r['peft_s']:.2f} | **{r['ratio']:.2f}** | {r['ours_rss_mb']:.0f} "
        f"| {r['peft_rss_mb']:.0f} | {r['ours_first_step_s']:.1f} / {r['peft_first_step_s']:.1f} |"
        for name, r in (("LoRA", results["lora"]), ("DoRA", results["dora"]))
    ]
    rows.append(f"| the frozen weights' products alone, torch | | {results['products']['torch_s']:.2f} | | | | |")
    return "\n".join([head, "|---|" + "---:|" * 6, *rows])


def bench_answers() -> str:
    """A loss on answers alone beside peft's, from `experiments/bench/results/answers.json`."""
    r = _json("experiments/bench/results/answers.json")
    ours = (f"ours, `logits_chunk_tokens={n}`" for n in (0, 128))
    head = f"| tokens with weight | peft, s/step | {' | '.join(ours)} | peft / ours |"
    row = f"| {r['answers']:.0%} | {r['peft']:.2f} | {r['0']:.2f} | {r['128']:.2f} | **{r['peft'] / r['128']:.2f}** |"
    return f"{head}\n{'|---:' * 5}|\n{row}"


def nf4() -> str:
    """NF4 beside bitsandbytes', from `experiments/bench/results/nf4.json`."""
    head = "| kernel | double | error, ours / bitsandbytes | quantise, ms | dequantise, ms | 512 rows times it, ms |"
    both = lambda pair, form: f"{pair['ours']:{form}} / {pair['bitsandbytes']:{form}}"  # noqa: E731
    rows = [
        f"| {r['kernel']}, {r['shape'][0]} x {r['shape'][1]} | {'yes' if r['double'] else 'no'} "
        f"| {both(r['error'], '.4f')} | {both(r['quantise'], '.2f')} | {both(r['dequantise'], '.2f')} "
        f"| {both(r['matmul'], '.2f')} |"
        for name, r in _json("experiments/bench/results/nf4.json").items()
        if name != "machine"
    ]
    return "\n".join([head, "|---|---|" + "---:|" * 4, *rows])


def quickstart() -> str:
    """What the quickstart reached, from `experiments/quickstart/results/summary.json`."""
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
    """What the plan says of a run that does not fit, from `experiments/plan/results/t4.txt`."""
    return f"```\n{(ROOT / 'experiments/plan/results/t4.txt').read_text()}```"


def methods() -> str:
    """Every method: what it trains, what it costs, what it reaches; from `experiments/methods/results`."""
    entries = _json("experiments/methods/results/catalogue.json")
    scored = {(row["method"], row["task"]): row for row in _csv("experiments/methods/results/table.csv")}
    head = "| row | config | what it is | family | merges | trained, SmolLM2-135M "
    head += "| topics, accuracy | s/step | headlines, perplexity | s/step |"
    rows = [
        f"| `{name}` | `{e['config']}` | {e['trains']} | {e['family']} | {'yes' if e['merges'] else 'no'} "
        f"| {'-' if e['trained_params'] is None else format(e['trained_params'], ',')} "
        f"| {_score(scored.get((name, 'topics')))} | {_score(scored.get((name, 'headlines')))} |"
        for name, e in entries.items()
    ]
    return "\n".join([head, "|---|---|---|---|---|---:|---:|---:|---:|---:|", *rows])


def quantization() -> str:
    """Every base untuned and with what was tuned on it, from `experiments/quantization/results/table.csv`."""
    found = {(r["base"], r["method"], r["task"]): r for r in _csv("experiments/quantization/results/table.csv")}
    head = "| base | tuned by | bits a weight | topics, accuracy | s/step | headlines, perplexity | s/step |"
    lines = []
    for base, method in dict.fromkeys(key[:2] for key in found):
        topics, headlines = (found.get((base, method, task)) for task in ("topics", "headlines"))
        bits = float((topics or headlines)["bits_per_weight"])
        lines.append(f"| {base} | {method} | {bits:.2f} | {_score(topics)} | {_score(headlines)} |")
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---:|", *lines])


def _score(row: dict[str, str] | None) -> str:
    """`mean ± interval | seconds a step`; dashes for what was not run."""
    if row is None:
        return "- | -"
    step = "-" if row["step_s"] == "nan" else f"{float(row['step_s']):.2f}"
    return f"{spelled(float(row['score_mean']), float(row['score_ci95']))} | {step}"


TABLES: dict[str, Callable[[], str]] = {
    "bench/answers": bench_answers,
    "bench/nf4": nf4,
    "bench/step": bench_step,
    "counts": counts,
    "methods": methods,
    "plan": plan,
    "quantization": quantization,
    "quickstart": quickstart,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew. Raises KeyError for a name that is not in TABLES."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def _json(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text())


def _csv(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / path).read_text().splitlines()))


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
