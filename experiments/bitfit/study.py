"""BitFit: all biases, those of the queries and of the feed-forward layer's input, and random entries in their place.

MiniLM has 26,112 biases outside its head, 11,520 of them in the smaller set. The random entries are spread evenly over
the kernels of attention, so that both sets of them are exactly as large as the sets of biases.
"""

from collections.abc import Mapping
from typing import Any

from experiments.protocol import paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size

FEW = r"layers/(attn/q|mlp/up)/bias"  # the paper's b_q and b_m2


def random_entries(count: int, layers: int, width: int) -> Mapping[str, Any]:
    """Random entries of the attention's kernels, `count` in all."""
    kernel = count / (4 * layers)
    assert kernel.is_integer()
    target = r"layers/attn/(q|k|v|o)/kernel"
    return {"name": "sparse", "choose": "random", "density": int(kernel) / width**2, "target": target}


def rows(layers: int, width: int, scale: float) -> tuple[Row, ...]:
    """The rows for an encoder of this size; `scale` multiplies the learning rates."""
    few = layers * 5 * width  # of the queries, and four times as many of the feed-forward layer's input
    many = layers * 11 * width + 2 * width  # eleven widths in a layer, the embeddings' norm and the pooler
    rates = {name: tuple(scale * rate for rate in r) for name, r in RATES.items()}
    printed = {name: dict(zip(("MNLI", "average"), of, strict=True)) for name, of in PRINTED.items()}
    return (
        Row({"trained": "all biases"}, {"method": {"name": "bitfit"}}, printed["bitfit"], rates["bitfit"]),
        Row({"trained": "biases of q and up"}, {"method": {"name": "chosen", "leaves": FEW}}, {}, rates["bitfit"]),
        Row(
            {"trained": "as many random entries"}, {"method": random_entries(many, layers, width)}, {}, rates["random"]
        ),
        Row({"trained": "fewer random entries"}, {"method": random_entries(few, layers, width)}, {}, rates["random"]),
        Row({"trained": "everything"}, {"method": {"name": "full"}}, printed["full"], rates["full"]),
    )


RATES = {"bitfit": (3e-3, 1e-2, 3e-2), "random": (1e-2, 3e-2, 1e-1), "full": (1e-4, 3e-4, 1e-3)}
PRINTED = {"bitfit": ("84.7", "85.2"), "full": ("87.6", "86.4")}
EXPERIMENT = Experiment(
    name="bitfit",
    question="Are biases special, or do as many other parameters learn as much?",
    metric="accuracy",
    baseline={"trained": "all biases"},
    small=Size(tasks.topics(), rows(6, 384, 1.0), rates=()),
    paper=Size(
        paper_runs.mnli("roberta-base", steps=24_000, batch_size=16, seq_len=128, warmup=1440, weight_decay=0.1),
        rows(12, 768, 0.1),
        rates=(),
        splits=paper_runs.MNLI_SPLITS,
    ),
    source="arXiv:2106.09685, Table 2, RoBERTa-base",
)
get_study = EXPERIMENT.get_study
