"""LoRA, adapters and full fine-tuning on the first 30, 100 and 1000 articles, for the same number of steps."""

from typing import Any

from experiments import plotting
from experiments.protocol import paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.table import as_number

LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r"layers/attn/(q|v)/kernel"}
ADAPTERS, FULL = {"name": "houlsby", "width": 16}, {"name": "full"}
# Of the paper's Table 16, by examples.
PRINTED = {
    "LoRA": {100: "63.8", 1_000: "85.6", 10_000: "89.2", 392_702: "91.7"},
    "full": {100: "60.2", 1_000: "85.8", 10_000: "88.9", 392_702: "89.5"},
}
RATES = {"LoRA": (3e-3, 1e-2, 3e-2), "adapters": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)}


def row(name: str, method: dict[str, Any], examples: int, scale: float = 1.0) -> Row:
    """A method on so many examples, with the learning rates of RATES times `scale`."""
    printed = {"MNLI": PRINTED.get(name, {}).get(examples, "")}
    point = {"method": method, "data.max_examples": examples}
    rates = tuple(scale * rate for rate in RATES[name])
    return Row({"method": name, "examples": str(examples)}, point, printed, rates)


def plot(experiment: Experiment, rows: Any) -> bytes:
    """The score against the number of examples, a line for each method, as PNG."""
    figure, [axes] = plotting.make_figure()
    series = {}
    for name in dict.fromkeys(line["method"] for line in rows):
        own = [line for line in rows if line["method"] == name]
        series[name] = tuple([as_number(line[key]) for line in own] for key in ("examples", "score_mean", "score_ci95"))
    plotting.draw_lines(axes, series)
    axes.set_xlabel("examples")
    axes.set_ylabel(experiment.metric)
    return plotting.to_png(figure)


METHODS = {"LoRA": LORA, "adapters": ADAPTERS, "full": FULL}
EXPERIMENT = Experiment(
    name="data_size",
    question="How many examples does each method need?",
    metric="accuracy",
    baseline={"method": "LoRA"},
    within=("examples",),
    small=Size(
        tasks.topics(),
        tuple(row(name, method, examples) for examples in (30, 100, 1_000) for name, method in METHODS.items()),
        rates=(),
    ),
    paper=Size(
        paper_runs.mnli("llama-175b", steps=12_000, batch_size=128, seq_len=256, warmup=250, weight_decay=0.1),
        tuple(row(name, METHODS[name], examples, 0.02) for examples in PRINTED["LoRA"] for name in PRINTED),
        rates=(),
        splits=paper_runs.MNLI_SPLITS,
    ),
    source="arXiv:2106.09685, Table 16, GPT-3 175B",
    plot=plot,
)
get_study = EXPERIMENT.get_study
