"""LoRA at ranks from 1 to 256, the scale alpha / r being 2, and the directions that it learns in the middle layer."""

from experiments.lora_rank.analysis import amplification_table, analyze
from experiments.protocol import paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size

SCALE = 2  # alpha / r
QV, QKVO = ("q", "v"), ("q", "k", "v", "o")
# Of the paper's Table 6, by kernels and rank: WikiSQL and MultiNLI.
PRINTED = {
    QV: {1: ("73.4", "91.3"), 2: ("73.3", "91.4"), 4: ("73.7", "91.3"), 8: ("73.8", "91.6"), 64: ("73.5", "91.4")},
    QKVO: {1: ("74.1", "91.2"), 2: ("73.7", "91.7"), 4: ("74.0", "91.7"), 8: ("74.0", "91.5"), 64: ("73.9", "91.4")},
}


def row(rank: int, kernels: tuple[str, ...] = QV) -> Row:
    """LoRA of a rank on these kernels of attention."""
    target = rf"layers/attn/({'|'.join(kernels)})/kernel"
    method = {"name": "lora", "rank": rank, "alpha": float(SCALE * rank), "target": target}
    printed = dict(zip(("WikiSQL", "MultiNLI"), PRINTED[kernels].get(rank, ("", "")), strict=True))
    return Row({"kernels": ", ".join(kernels), "rank": str(rank)}, {"method": method}, printed)


EXPERIMENT = Experiment(
    name="lora_rank",
    question="Which rank does LoRA need?",
    metric="accuracy",
    baseline={"rank": "8"},
    small=Size(tasks.topics(), tuple(row(rank) for rank in (1, 2, 4, 8, 64, 256)), rates=(3e-3, 1e-2, 3e-2)),
    paper=Size(
        paper_runs.mnli("llama-175b", steps=12_000, batch_size=128, seq_len=256, warmup=250, weight_decay=0.1),
        tuple(row(rank, kernels) for kernels, printed in PRINTED.items() for rank in printed),
        rates=(5e-5, 1e-4, 2e-4),
        splits=paper_runs.MNLI_SPLITS,
    ),
    source="arXiv:2106.09685, Table 6, GPT-3 175B",
    analyze=analyze,
    more=amplification_table,
)
get_study = EXPERIMENT.get_study
