"""Five objectives learn the same preferences from the same start: what they win, and what they forget.

The start is SmolLM2-135M-Instruct after supervised tuning on chosen and rejected lines alike, so that it writes both.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments.merging import tasks
from experiments.objectives import pairs
from experiments.objectives.part import Numbers, Part, Size
from experiments.objectives.texts import perplexity_elsewhere
from experiments.protocol import measures
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from lowrank.adapters import export
from lowrank.core.files import scratch_beside
from lowrank.core.paths import expand
from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source
from lowrank.evaluation.evaluate import row_values
from lowrank.generation import generate
from lowrank.models import build_model
from lowrank.objectives import build_objective
from lowrank.training import loop
from lowrank.training.loop import ADAPTER

FOLDER = Path("runs/objectives/texts")
STARTED, PAIRS, JUDGED = (FOLDER / name for name in ("start", "pairs", "judged"))
LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r".*/(q|k|v|o|gate|up|down)/kernel"}
MAX_NEW = 24
ROWS: dict[str, dict[str, Any]] = {
    "DPO": {"objective": {"name": "preference", "loss": "dpo", "beta": 0.1}},
    "IPO": {"objective": {"name": "preference", "loss": "ipo", "beta": 0.1}},
    "SimPO": {"objective": {"name": "preference", "loss": "simpo", "beta": 2.0, "gamma_ratio": 0.5}},
    "ORPO": {"objective": {"name": "preference", "loss": "orpo", "beta": 0.1}},
    "KTO": {"objective": {"name": "kto", "beta": 0.1}, "data.source": f"jsonl:{JUDGED}", "data.batch_size": 8},
}


def prepare(size: Size) -> None:
    """Writes the texts, and the model that the runs start from."""
    tasks.write_texts()
    train, test = ([*pairs.pairs(split)] for split in ("train", "test"))
    half = len(train) // 2
    both = [_answer(pair, key) for pair in train[:half] for key in ("chosen", "rejected")]
    pairs.write(STARTED, {"train": both})
    pairs.write(PAIRS, {"train": train[half:], "test": test})
    judged = [{**_answer(p, key), "label": key == "chosen"} for p in train[half:] for key in ("chosen", "rejected")]
    pairs.write(JUDGED, {"train": judged})
    if not start_folder(size).exists():
        _tune_start(size)


def start_folder(size: Size) -> Path:
    """The checkpoint that the runs of a size start from."""
    return FOLDER.with_name(f"start-{Path(size.model).name}-{size.start_steps}")


def _answer(pair: pairs.Pair, key: str) -> dict[str, str]:
    return {"prompt": pair["prompt"], "completion": pair[key]}


def _tune_start(size: Size) -> None:
    """Tunes the base on lines of both kinds, and merges the adapter."""
    config = _config(size.model, size.start_steps, 2e-3)
    config.data.source, config.data.batch_size = f"jsonl:{STARTED}", 8
    config.objective = "causal_lm"
    folder = start_folder(size)
    loop.run(config, runs := folder.with_name(f"{folder.name}-run"))
    model = measures.load_model(config.to_dict(), runs / ADAPTER)
    with scratch_beside(folder, folder=True) as scratch:
        export.merge_to_hf(model.base.params, model.base, scratch)
        scratch.rename(folder)


def _config(model: str, steps: int, rate: float) -> ConfigDict:
    data = {"split": "train", "seq_len": 96, "batch_size": 4, "packing": False, "too_long": "drop"}
    return common.new(
        seed=0,
        steps=steps,
        objective="causal_lm",
        model={"name": model, "remat": "dots"},
        method=LORA,
        data={"source": f"jsonl:{PAIRS}", "prompt_loss_weight": 0.0, **data},
        optim={"name": "adamw", "lr": rate, "schedule": "linear", "warmup": 2, "clip": 1.0},
        eval={"max_examples": 0},
        logits_chunk_tokens=128,
        log_every=4,
    )


def config(size: Size) -> ConfigDict:
    """The config of a run."""
    return _config(str(start_folder(size)), size.steps, 2e-4)


def measure(model: Model, size: Size) -> Numbers:
    """The accuracy on held-out pairs, how often generated lines follow the rule, and perplexity elsewhere.

    A pair is won if the log-ratio of the model and its start is larger for the chosen answer. All pairs of the start
    itself are ties, which are not won.
    """
    own, tokens = answer_log_probs(model, size)
    ratios = np.float64(own) - np.float64(start_log_probs(size))
    means = own / tokens
    return {
        "accuracy": float(np.mean(ratios[:, 0] > ratios[:, 1])),
        "likelier": float(np.mean(means[:, 0] > means[:, 1])),
        "rule": float(np.mean(rule_holds(model, size))),
        "chosen": float(np.mean(ratios[:, 0])),
        "elsewhere": perplexity_elsewhere(model, size.records),
    }


@functools.cache
def start_log_probs(size: Size) -> np.ndarray:
    """The log-probabilities `[N, 2]` of `answer_log_probs` by the model that the runs of a size start from."""
    return answer_log_probs(measures.load_model(config(size).to_dict()), size)[0]


def answer_log_probs(model: Model, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """`(log-probabilities, tokens)` of both answers of the first test pairs, each `[N, 2]`."""
    objective = build_objective("preference")
    loader = model.loader(objective, source=f"jsonl:{PAIRS}", split="test", max_examples=size.records, batch_size=4)
    network, sums, tokens = build_model(model.base.config), [], []
    for batch in loader:
        valid = batch["valid"] == 1
        found = row_values(objective, network, model.base.params, batch, bind=model.bind)
        sums.append(found[valid])
        tokens.append(batch["weights"].sum(-1)[valid])
    return np.concatenate(sums), np.concatenate(tokens)


def rule_holds(model: Model, size: Size) -> list[bool]:
    """Whether the line that the model writes for each of the first test articles follows the rule."""
    source = open_source("bbc_news", "test", expand(DATA_DIR))
    articles = [pairs.shown(source[i]) for i in range(size.records)]
    prompts = [pairs.PROMPT.format(text=text) for text in articles]
    lines = generate.texts(model.base, model.base.params, prompts, max_new=MAX_NEW, bind=model.bind)
    return [pairs.follows_rule(line, text) for line, text in zip(lines, articles, strict=True)]


PART = Part(
    name="preferences",
    question="Which objective learns a preference best from the same pairs, and what does it forget?",
    rows=ROWS,
    baseline="DPO",
    prepare=prepare,
    config=config,
    measure=measure,
    headings={
        "rule": Heading("generated lines that follow the rule", "max"),
        "accuracy": Heading("accuracy on held-out pairs", "max"),
        "likelier": Heading("pairs whose chosen line is likelier", "max"),
        "chosen": Heading("log-ratio of the chosen line"),
        "elsewhere": Heading("perplexity elsewhere", "min"),
    },
)
