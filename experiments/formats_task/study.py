"""A headline becomes strict JSON with its section and itself: what a model writes before and after fine-tuning.

The prompt describes the format, so that an untrained model could follow it. A continuation is valid if it is JSON as a
whole, and exact if it is the object that was asked for.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import plotting
from experiments.protocol import measures, paper_runs
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, read_rows, row_name
from experiments.protocol.tasks import headlines
from lowrank import data
from lowrank.core.config_file import with_changes
from lowrank.core.paths import AnyPath
from lowrank.data.config import DataConfig
from lowrank.generation import generate
from lowrank.sweeps.folder import StudyFolder

SECTIONS = "business, entertainment, politics, sports or tech"
PROMPT = (
    f"Name the section of a news headline ({SECTIONS}) and repeat the headline, as JSON.\n\nHeadline: {{title}}\nJSON:"
)
COMPLETION = ' {{"section": "{label}", "headline": "{title}"}}'
PROMPTS, MAX_NEW = 48, 32  # held-out headlines, and tokens of a continuation
DATA = {
    "data.template": PROMPT,
    "data.completion": COMPLETION,
    "data.truncate": "title",
    "data.seq_len": 80,
}


def score_texts(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The shares of texts that are valid JSON, have the keys that were asked for, and are right.

    `section` is the share with the right section and `headline` that with the right headline; `exact` has both, and no
    other key. Nothing but JSON may be in a text.
    """
    pairs = [(parse(text), json.loads(reference)) for text, reference in zip(texts, references, strict=True)]
    share = lambda hits: sum(hits) / len(pairs)  # noqa: E731
    objects = [(found if isinstance(found, dict) else {}, wanted) for found, wanted in pairs]
    return {
        "valid": share(found is not None for found, _ in pairs),
        "keys": share(found.keys() == wanted.keys() for found, wanted in objects),
        "section": share(found.get("section") == wanted["section"] for found, wanted in objects),
        "headline": share(found.get("headline") == wanted["headline"] for found, wanted in objects),
        "exact": share(found == wanted for found, wanted in objects),
    }


def parse(text: str) -> Any:
    """The value that a text is the JSON of; None if it is not."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def measure(model: Model) -> dict[str, float]:
    """The scores of the greedy continuations of held-out prompts."""
    group = {**model.run.data.to_dict(), "split": "test", "max_examples": PROMPTS, "shuffle": False, "epochs": 1}
    records = data.read_examples(DataConfig(**group), model.base.tokenizer, MAX_NEW, data.LANGUAGE)
    prompts = [record["prompt_ids"] for record in records]
    texts = generate.texts(model.base, model.base.params, prompts, max_new=MAX_NEW, bind=model.bind)
    return score_texts(texts, [record["completion"] for record in records])


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Writes the shares of valid and exact answers."""
    measures.write(experiment, study, results, measure)


def more(experiment: Experiment, folder: Path) -> str:
    """The measures, and which rows they tell from the untrained model."""
    table = measures.markdown(experiment, folder, HEADINGS)
    return f"{table}\n\n**{before_and_after(experiment, folder)}**" if table else ""


def before_and_after(experiment: Experiment, folder: Path) -> str:
    """Whose exact match is above the untrained model's, by the 95 % interval over the seeds."""
    *rows, before = read_rows(folder / measures.MEASURES_FILE)
    level = as_number(before["exact_mean"])
    above = [as_number(row["exact_mean"]) - as_number(row["exact_ci95"]) > level for row in rows]
    told, rest = (
        ", ".join(row_name(experiment, row) for row, is_above in zip(rows, above, strict=True) if is_above == wanted)
        for wanted in (True, False)
    )
    found = f"above it {told}" if told else ""
    return f"The untrained model's exact match is {level:.3f}: {found or 'no row is above it'}" + (
        f"; not decided: {rest}." if rest else "."
    )


HEADINGS = {
    "valid": Heading("valid JSON"),
    "keys": Heading("right keys"),
    "section": Heading("right section"),
    "headline": Heading("right headline"),
    "exact": Heading("exact match", "max"),
}


def plot(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The shares of valid, of rightly keyed and of exact answers."""
    figure, panels = plotting.make_figure(columns=3, width=3.2, height=2.4)
    for axes, key in zip(panels, ("valid", "section", "exact"), strict=True):
        means, halves = ([as_number(row[f"{key}_{part}"]) for row in rows] for part in ("mean", "ci95"))
        names = [row_name(experiment, row) if axes is panels[0] else "" for row in rows]
        plotting.draw_forest(axes, names, means, halves)
        axes.set_xlabel(f"share: {HEADINGS[key].text}")
    return plotting.to_png(figure)


def row(kind: str, method: Mapping[str, Any], rates: tuple[float, ...], examples: str, steps: int) -> Row:
    """A row with a number of steps, so that it shows how many examples the format takes."""
    return Row({"method": kind, "examples": examples}, {"method": method, "steps": steps}, {}, rates)


MORE, FEWER = "more", "fewer"
LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r"layers/(attn|mlp)/.*/kernel"}
SMALL_ROWS = (
    row("LoRA", LORA, (1e-3, 3e-3), MORE, 24),
    row("(IA)³", {"name": "ia3"}, (1e-2, 3e-2), MORE, 24),
    row("LoRA", LORA, (1e-3, 3e-3), FEWER, 8),
    row("full", {"name": "full"}, (1e-4, 3e-4), MORE, 24),
)
PAPER_ROWS = (
    row("LoRA", LORA, (), MORE, 3000),
    row("LoRA", LORA, (), FEWER, 300),
    row("full", {"name": "full"}, (3e-6, 1e-5), MORE, 3000),
)
PAPER = paper_runs.instructions(
    "llama2-7b",
    "tfds:ag_news_subset",
    PROMPT.replace(SECTIONS, "World, Sports, Business or Sci/Tech"),
    COMPLETION,
    steps=3000,
    batch_size=32,
    seq_len=256,
    warmup=100,
)
EXPERIMENT = Experiment(
    name="formats_task",
    question="Does fine-tuning teach a model to answer in strict JSON, and rightly?",
    metric="perplexity",
    baseline={"method": "LoRA", "examples": MORE},
    small=Size(with_changes(headlines(), DATA), SMALL_ROWS, rates=(), seeds=3, rate_seeds=1),
    paper=Size(PAPER, PAPER_ROWS, rates=(1e-4, 3e-4), splits=paper_runs.HELD_OUT_SPLITS),
    analyze=analyze,
    plot=plot,
    more=more,
)
get_study = EXPERIMENT.get_study
