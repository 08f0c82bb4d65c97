"""The rows of the page of all benchmarks, from the result files of this folder; `make tables` writes the page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.step_cases import CASES

RESULTS = Path(__file__).parent / "results"
OURS = "ours"  # the package's own form among those that a GPU's benchmark times


class Row(NamedTuple):
    """One measured work. Times carry their unit; an empty cell was not measured, or does not exist."""

    work: str
    machine: str
    ours: str
    xla: str  # the fastest form in plain XLA
    peers: str
    limit: str  # what no implementation is faster than on that machine
    ratio: str  # the first peer's time over ours, or that of the XLA form where there is no peer
    range: str  # of the ratio over the rounds, or of our times
    command: str


def table() -> str:
    """All rows as Markdown."""
    rows = [*step_rows(), *answer_rows(), *text_rows(), *nf4_rows(), *gpu_rows()]
    head = "| work | machine | ours | strongest XLA form | peers | limit | ratio | range | command |"
    return "\n".join([head, "|---|---|---:|---:|---|---:|---:|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def step_rows() -> Iterator[Row]:
    """A training step beside peft's, on every processor; the limit is the products with frozen weights alone."""
    for processor, results in _results("step").items():
        tunix = results.get("tunix", {})
        for case in (case for case in CASES if case.name in results):
            r = results[case.name]
            peers = f"peft {r['peft_s']:.2f} s"
            if case.name == "lora float32" and tunix:
                peers += f"; tunix {_tunix(tunix)}"
            yield Row(
                f"step, {case.method} {case.precision}",
                processor,
                f"{r['ours_s']:.2f} s",
                "",
                peers,
                f"{r['products_s']:.2f} s ({r['share_of_limit']:.0%})",
                f"{r['ratio']:.2f}",
                _range(r["ratio_range"]) if "ratio_range" in r else f"{_range(r['ours_range_s'])} s",
                "`make bench`",
            )


def answer_rows() -> Iterator[Row]:
    """A step whose loss is on answers alone."""
    r = _results("answers")
    machine, ratio = _machine(r), r["peft"] / r["128"]
    times = (f"{r['128']:.2f} s", f"{r['0']:.2f} s, all logits", f"peft {r['peft']:.2f} s")
    yield Row("step, loss on answers", machine, *times, "", f"{ratio:.2f}", "", "`python -m experiments.bench.answers`")


def text_rows() -> Iterator[Row]:
    """Texts beside those of transformers and peft, on every processor."""
    for processor, results in _results("generate").items():
        for rows, r in results.items():
            if rows.isdecimal():
                peers = f"peft {r['peft_tokens_s']:.0f} tokens/s; transformers, merged {r['merged_tokens_s']:.0f}"
                yield Row(
                    f"texts, {rows} at a time",
                    processor,
                    f"{r['ours_tokens_s']:.0f} tokens/s",
                    "",
                    peers,
                    "",
                    f"{r['ratio']:.2f}",
                    _range(r["ratio_range"]),
                    "`python -m experiments.bench.generate`",
                )


def nf4_rows() -> Iterator[Row]:
    """NF4 kernels beside bitsandbytes'."""
    results = _results("nf4")
    for name, r in results.items():
        for operation in ("quantize", "dequantize", "matmul") if name != "machine" else ():
            of = r[operation]
            times = (f"{of['ours']:.2f} ms", "", f"bitsandbytes {of['bitsandbytes']:.2f} ms", "")
            command = "`python -m experiments.bench.nf4`"
            yield Row(f"NF4 {operation}, {name}", _machine(results), *times, f"{of['ratio']:.2f}", "", command)


def gpu_rows() -> Iterator[Row]:
    """Products on each GPU that was at hand, forward alone and with the backward pass."""
    for path in sorted(RESULTS.glob("gpu-*.json")):
        results = json.loads(path.read_text())
        for name, of in results.get("kernels", {}).items():
            for part in ("forward", "both"):
                yield from _gpu_row(f"{name}, {part}", results["device"], of, part)


def _gpu_row(work: str, device: str, of: dict[str, Any], part: str) -> Iterator[Row]:
    forms = {name: form[part] for name, form in of.get("jax", {}).items() if part in form}
    peers = {name: form[part]["median"] for name, form in of.items() if name != "jax" and part in form}
    if OURS not in forms:
        return
    ours = forms.pop(OURS)
    least = min((form["median"] for form in forms.values()), default=None)
    best = next(iter(peers.values()), least)
    yield Row(
        work,
        device,
        f"{ours['median']:.3f} ms",
        f"{least:.3f} ms" if least else "",
        "; ".join(f"{name} {ms:.3f} ms" for name, ms in peers.items()),
        "",
        f"{best / ours['median']:.2f}" if best else "",
        f"{_range([ours['least'], ours['most']])} ms",
        "`make gpu-bench`",
    )


def _tunix(of: dict[str, Any]) -> str:
    return f"{of['step_s']:.2f} s" if "step_s" in of else f"not measured: {of['refused']}"


def _range(pair: list[float]) -> str:
    return f"{pair[0]:.2f}–{pair[1]:.2f}"


def _machine(results: dict[str, Any]) -> str:
    """The processor, where the file names it."""
    return results["machine"].get("processor", "")


def _results(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
