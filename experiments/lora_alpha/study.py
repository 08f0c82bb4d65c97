"""LoRA's scale: alpha : r from 1:8 to 8:1, and rsLoRA's alpha / sqrt(r) at two ranks with one alpha.

Every row is tried at four learning rates, so that `rates.csv` also shows whether the best rate of one row is that of
another, which is what a scale should achieve when the rank changes.
"""

from collections.abc import Mapping, Sequence

from experiments import plotting
from experiments.protocol import paper_runs, tasks
from experiments.protocol.experiment import RATES_FILE, Experiment, Row, Size
from experiments.protocol.table import read_rows, row_name
from lowrank.core.files import write_bytes
from lowrank.core.paths import AnyPath
from lowrank.sweeps.folder import StudyFolder


def row(rank: int, alpha: int, rslora: bool = False, target: str = r"layers/attn/(q|v)/kernel") -> Row:
    """LoRA, or rsLoRA, of a rank and an alpha."""
    method = {"name": "lora", "rank": rank, "alpha": float(alpha), "rslora": rslora, "target": target}
    scale = alpha / (rank**0.5 if rslora else rank)
    labels = {"formula": "alpha / sqrt(r)" if rslora else "alpha / r", "rank": str(rank), "alpha": str(alpha)}
    return Row({**labels, "scale": f"{scale:.3g}"}, {"method": method})


def rows(ranks: Sequence[int], **options: str) -> tuple[Row, ...]:
    """alpha : r of 1:8, 1:1 and 8:1 at the first rank, then its alpha at the others, and the same for rsLoRA."""
    first, *more = ranks
    ratios = [row(first, alpha, **options) for alpha in (first // 8, first, 8 * first)]
    plain = [row(rank, first, **options) for rank in more]
    return (*ratios, *plain, *(row(rank, first, rslora=True, **options) for rank in ranks))


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes `transfer.png`: the validation score of every row at every learning rate."""
    del study
    write_bytes(results / "transfer.png", plot_transfer(experiment, read_rows(results / RATES_FILE)))


def plot_transfer(experiment: Experiment, rates: Sequence[Mapping[str, str]]) -> bytes:
    """The rows of `rates.csv` as a heat map of rows times learning rates, as PNG."""
    figure, [axes] = plotting.make_figure(width=5.6, height=3.0)
    values = [[float(score) for score in line[f"validation_{experiment.metric}"].split()] for line in rates]
    names = [row_name(experiment, line) for line in rates]
    plotting.draw_heat_map(axes, values, names, rates[0]["rates"].split())
    axes.set_xlabel("learning rate")
    axes.set_title(f"{experiment.metric} on validation, {rates[0]['seeds']} seeds")
    return plotting.to_png(figure)


EXPERIMENT = Experiment(
    name="lora_alpha",
    question="How should LoRA's update be scaled, and does a learning rate carry over to another rank?",
    metric="accuracy",
    baseline={"formula": "alpha / r", "rank": "8", "alpha": "8"},
    small=Size(tasks.topics(), rows((8, 64)), rates=(1e-3, 3e-3, 1e-2, 3e-2)),
    paper=Size(
        paper_runs.instructions(
            "llama2-7b",
            "tfds:gsm8k",
            "{question}\n",
            "{answer}",
            steps=1400,
            batch_size=16,
            seq_len=512,
            warmup=40,
        ),
        rows((8, 32, 128, 512, 2048), target=r"layers/(attn|mlp)/(q|k|v|o|gate|up|down)/kernel"),
        rates=(2e-5, 5e-5, 1e-4, 2e-4),
        splits=paper_runs.GSM8K_SPLITS,
        metric="perplexity",
    ),
    analyze=analyze,
)
get_study = EXPERIMENT.get_study
