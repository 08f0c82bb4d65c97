"""LoRA on one kernel, on pairs, on all of attention and on the feed-forward layer, at the same number of parameters.

The paper's Table 5 spreads 18,874,368 parameters over GPT-3. In MiniLM every attention kernel is 384 x 384, and the two
of a feed-forward layer are 384 x 1536, so that a rank costs 768 and 1920 parameters, and all rows spread 30,720 of them
over each layer. The scale alpha / r is 2 everywhere.
"""

from collections.abc import Mapping
from typing import Any

from experiments.protocol import paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size

SCALE = 2.0  # alpha / r
ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("up", "down")
PRINTED = {  # of the paper's Table 5: WikiSQL ± 0.5 and MultiNLI ± 0.1
    "q": ("70.4", "91.0"),
    "k": ("70.0", "90.8"),
    "v": ("73.0", "91.0"),
    "o": ("73.2", "91.3"),
    "q, k": ("71.4", "91.3"),
    "q, v": ("73.7", "91.3"),
    "q, k, v, o": ("73.7", "91.7"),
}


def row(ranks: Mapping[str, int]) -> Row:
    """LoRA with a rank for each kind of kernel."""
    modules, largest = "|".join(ranks), max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    method: dict[str, Any] = {"name": "lora", "rank": largest, "alpha": SCALE * largest}
    method["target"] = rf"layers/(attn|mlp)/({modules})/kernel"
    if smaller:
        patterns = {rf".*/{module}/kernel": rank for module, rank in smaller.items()}
        method["rank_pattern"] = patterns
        method["alpha_pattern"] = {pattern: SCALE * rank for pattern, rank in patterns.items()}
    names = ", ".join(ranks)
    printed = dict(zip(("WikiSQL", "MultiNLI"), PRINTED.get(names, ("", "")), strict=True))
    return Row(
        {"kernels": names, "rank": " and ".join(map(str, dict.fromkeys(ranks.values())))}, {"method": method}, printed
    )


def rows(budget: int) -> tuple[Row, ...]:
    """The paper's rows: `budget` ranks of an attention kernel in each layer."""
    spread = (*((each,) for each in ATTENTION), ("q", "k"), ("q", "v"), ATTENTION)
    return tuple(row(dict.fromkeys(kernels, budget // len(kernels))) for kernels in spread)


SMALL_ROWS = (
    *rows(40),
    row(dict.fromkeys(FEED_FORWARD, 8)),
    row({**dict.fromkeys(ATTENTION, 5), **dict.fromkeys(FEED_FORWARD, 4)}),
)
EXPERIMENT = Experiment(
    name="lora_targets",
    question="Which kernels should LoRA adapt, at the same number of trained parameters?",
    metric="accuracy",
    baseline={"kernels": "q, v"},
    small=Size(tasks.topics(), SMALL_ROWS, rates=(3e-3, 1e-2, 3e-2)),
    paper=Size(
        paper_runs.mnli("llama-175b", steps=12_000, batch_size=128, seq_len=256, warmup=250, weight_decay=0.1),
        rows(8),
        rates=(5e-5, 1e-4, 2e-4),
        splits=paper_runs.MNLI_SPLITS,
    ),
    source="arXiv:2106.09685, Table 5, GPT-3 175B",
)
get_study = EXPERIMENT.get_study
