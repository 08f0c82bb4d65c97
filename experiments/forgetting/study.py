"""What each kind of method gains on its task, and what the model forgets of running text meanwhile.

SmolLM2 writes headlines, and is also scored on the articles' own text, which none of the runs trains on. The gain is
the fall of perplexity on held-out headlines, the loss its rise on the text, both from the untrained model's.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import plotting
from experiments.protocol import measures, paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, row_name
from lowrank.core.paths import AnyPath
from lowrank.objectives import causal_lm
from lowrank.sweeps.folder import StudyFolder

ARTICLES = 8  # about 3,600 tokens of text
ALL = r"layers/(attn|mlp)/.*/kernel"  # the paper adapts every kernel


def low_rank(name: str, rank: int) -> Mapping[str, Any]:
    """LoRA or DoRA on every kernel, with alpha / rank = 2."""
    return {"name": name, "rank": rank, "alpha": 2.0 * rank, "target": ALL}


def row(kind: str, method: Mapping[str, Any], rates: tuple[float, ...], printed: Sequence[str] = ()) -> Row:
    """A row with the paper's best score on code and its forgetting after 16 epochs."""
    columns = ("HumanEval", "what is kept")
    return Row({"method": kind}, {"method": method}, dict(zip(columns, printed, strict=False)), rates)


SMALL_ROWS = (
    row("LoRA r 16", low_rank("lora", 16), (3e-4, 1e-3, 3e-3), (".358", ".609")),
    row("LoRA r 128", low_rank("lora", 128), (1e-4, 3e-4, 1e-3), (".498 (r 256)", ".517 (r 256)")),
    row("DoRA r 16", low_rank("dora", 16), (3e-4, 1e-3, 3e-3)),
    row("full", {"name": "full"}, (1e-4, 3e-4), (".497", ".414")),
    row("BitFit", {"name": "bitfit"}, (3e-3,)),
    row("(IA)³", {"name": "ia3"}, (1e-2,)),
    row("adapters", {"name": "houlsby"}, (1e-3, 3e-3)),
    row("prompt", {"name": "prompt"}, (1e-1,)),
)
PAPER_ROWS = (
    row("LoRA r 16", low_rank("lora", 16), (), (".358", ".609")),
    row("LoRA r 64", low_rank("lora", 64), ()),
    row("LoRA r 256", low_rank("lora", 256), (), (".498", ".517")),
    row("full", {"name": "full"}, (1e-6, 5e-6, 1e-5, 5e-5), (".497", ".414")),
)


def perplexities(model: Model) -> dict[str, float]:
    """The perplexity of held-out headlines, and that of articles in running text."""
    articles = {"split": "test", "template": "text", "completion": "", "max_examples": ARTICLES}
    return {
        "task": model.score("test")["perplexity"],
        "text": model.evaluate(causal_lm(), **articles)["perplexity"],
    }


@functools.cache
def untrained(config: str) -> Mapping[str, float]:
    """The perplexities of the untrained model of a config in JSON."""
    return perplexities(measures.load_model(json.loads(config)))


def measure(model: Model) -> dict[str, float]:
    """The gain on the task, and the rise of perplexity on the text."""
    base = {**model.run.to_dict(), "method": {"name": "full"}, "seed": 0, "optim": {}}
    base["data"]["seed"] = 0
    before, after = untrained(json.dumps(base, sort_keys=True)), perplexities(model)
    return {"gain": before["task"] - after["task"], "rise": after["text"] - before["text"], **after}


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes what each model has gained and forgotten."""
    measures.write(experiment, study, results, measure)


HEADINGS = {
    "gain": Heading("gain (fall of perplexity on headlines)", "max"),
    "rise": Heading("rise of perplexity on articles", "min"),
    "text": Heading("perplexity of articles"),
}


def plot(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The rise of perplexity elsewhere against the gain on the task, one point for each row."""
    figure, [axes] = plotting.make_figure(width=6.4, height=4.0)
    for i, line in enumerate(rows):
        x, y, dx, dy = (as_number(line[key]) for key in ("gain_mean", "rise_mean", "gain_ci95", "rise_ci95"))
        look = {"color": plotting.COLORS[i % len(plotting.COLORS)], "marker": plotting.MARKERS[i // 2]}
        axes.errorbar([x], [y], xerr=[dx], yerr=[dy], label=row_name(experiment, line), linewidth=1, **look)
    axes.axhline(0.0, color=plotting.MUTED, linewidth=1, zorder=0)
    axes.set_xlabel("gain: fall of perplexity on headlines")
    axes.set_ylabel("rise of perplexity on articles")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return plotting.to_png(figure)


EXPERIMENT = Experiment(
    name="forgetting",
    question="What does each method forget for what it gains?",
    metric="perplexity",
    baseline={"method": "LoRA r 16"},
    small=Size(tasks.headlines(), SMALL_ROWS, rates=(), seeds=3, rate_seeds=1),
    paper=Size(
        paper_runs.instructions(
            "llama2-7b",
            "tfds:math_qa",
            "{Problem}\n\nAnswer:",
            " {Rationale}",
            steps=4000,
            batch_size=32,
            seq_len=1024,
            warmup=100,
        ),
        PAPER_ROWS,
        rates=(5e-5, 1e-4, 2e-4, 5e-4),
        seeds=3,
        rate_seeds=1,
        splits=paper_runs.HELD_OUT_SPLITS,
    ),
    source="arXiv:2405.09673, Tables S5 and S6, Llama-2-7B",
    analyze=analyze,
    plot=plot,
    more=functools.partial(measures.markdown, headings=HEADINGS),
)
get_study = EXPERIMENT.get_study
