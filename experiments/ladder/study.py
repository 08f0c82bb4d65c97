"""The same questions on every rung of a ladder, from a bare prompt to fine-tuning with retrieval.

A rung is a prompt and a model. What it lacks is read off two scores: whether its answer is strict JSON, which is form,
and whether the missing words are in it, which is a fact that only a passage can bring.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plotting
from experiments.ladder import questions
from experiments.protocol import measures, paper_runs, tasks
from experiments.protocol.experiment import Experiment, Row, Size
from experiments.protocol.model import Model
from experiments.protocol.table import as_number, read_rows
from lowrank.core.config_file import with_changes
from lowrank.core.paths import AnyPath
from lowrank.data import templates
from lowrank.generation import generate
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.statistics import holm, is_tied, sign_test
from lowrank.sweeps.tables import SAME, format_mean, markdown_table, mean_columns, write_csv
from lowrank.training.loop import ADAPTER

ASK = 'Fill the gap ____ in the news. Answer with JSON of one key, "answer", and nothing else.\n\n'
QUESTION, PASSAGE = "News: {question}\nJSON:", "Passage: {passage}\n\n"
ANSWER = ' {{"answer": "{answer}"}}'
ALONE, WITH_PASSAGE = ASK + QUESTION, ASK + PASSAGE + QUESTION
SHOTS, MAX_NEW = 3, 20  # examples in a prompt, and tokens of an answer
LADDER_FILE = "ladder.csv"
SCORES = {"json": "strict JSON", "fact": "the fact", "both": "the fact in strict JSON"}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A rung: how it asks, and the row of the study whose models it asks; -1: the untrained model."""

    name: str
    template: str
    row: int = -1
    shots: int = 0


RUNGS = (
    Rung("prompt", ALONE),
    Rung("few-shot", ALONE, shots=SHOTS),
    Rung("retrieval", WITH_PASSAGE),
    Rung("few-shot and retrieval", WITH_PASSAGE, shots=SHOTS),
    Rung("fine-tuning", ALONE, row=0),
    Rung("fine-tuning and retrieval", WITH_PASSAGE, row=1),
)


def score(text: str, answer: str) -> dict[str, float]:
    """Whether an answer is an object with the key `answer` alone, whether the fact is in it, and whether both hold."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    strict = isinstance(found, dict) and found.keys() == {"answer"}
    right = strict and found["answer"] == answer
    return {"json": float(strict), "fact": float(answer.lower() in text.lower()), "both": float(right)}


def prompts(rung: Rung, records: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompts of a rung for some questions, after its examples."""
    shown = examples[: rung.shots]
    before = "".join(templates.fill(rung.template + ANSWER + "\n\n", record, "an example") for record in shown)
    return [before + templates.fill(rung.template, record, "a question") for record in records]


def ask(rung: Rung, model: Model) -> dict[str, list[float]]:
    """The scores of a rung's model on every test question."""
    records, examples = (read_questions(split) for split in ("test", "train"))
    texts = generate.texts(
        model.base, model.base.params, prompts(rung, records, examples), max_new=MAX_NEW, bind=model.bind
    )
    scored = [score(text, record["answer"]) for text, record in zip(texts, records, strict=True)]
    return {key: [of[key] for of in scored] for key in SCORES}


def read_questions(split: str) -> list[dict[str, str]]:
    """The questions of a split."""
    return [json.loads(line) for line in (questions.FOLDER / f"{split}.jsonl").read_text().splitlines()]


def analyze(experiment: Experiment, study: StudyFolder, results: AnyPath) -> None:
    """Asks every rung; writes its scores, of which a trained rung's are means over its seeds."""
    per_row = len(study.cells) // len(experiment.small.rows)
    untrained = measures.load_model(study.cells[0].config)
    found: dict[str, dict[str, list[float]]] = {}
    for rung in RUNGS:
        cells = study.cells[rung.row * per_row : (rung.row + 1) * per_row] if rung.row >= 0 else ()
        models = (measures.load_model(cell.config, study.run_path(cell.key) / ADAPTER) for cell in cells)
        asked = [ask(rung, model) for model in (models if cells else (untrained,))]
        found[rung.name] = {key: list(np.mean([one[key] for one in asked], axis=0)) for key in SCORES}
    lines = ladder_rows(found)
    write_csv(results / LADDER_FILE, list(lines[0]), lines)


def ladder_rows(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """For each rung the mean of each score with its interval over the questions, and its difference from the first."""
    lines: list[dict[str, Any]] = [{"rung": rung, "questions": len(of["both"])} for rung, of in found.items()]
    for key in SCORES:
        by_item = [dict(enumerate(of[key])) for of in found.values()]
        tests = [sign_test(of, by_item[0]) for of in by_item]
        for line, of, p in zip(lines, by_item, holm(tests), strict=True):
            values = list(of.values())
            line |= mean_columns(key, values)
            line |= {
                f"{key}_minus": statistics.fmean(values) - statistics.fmean(by_item[0].values()),
                f"{key}_p_holm": p,
            }
    return lines


def more(experiment: Experiment, folder: Path) -> str:
    """The ladder, with what each rung adds to a bare prompt."""
    if not (folder / LADDER_FILE).exists():
        return ""
    rows = read_rows(folder / LADDER_FILE)
    lines = [[row["rung"], row["questions"], *(_cell(row, key) for key in SCORES)] for row in rows]
    table = markdown_table(["rung", "questions", *SCORES.values()], lines)
    note = (
        "± is half of Student's 95 % interval over the questions; a trained rung's score of a question is the mean "
        f"over its seeds. {SAME} marks a score that the questions cannot tell from the prompt's (exact sign test "
        "over the questions, corrected by Holm over the rungs)."
    )
    return f"{table}\n\n{note}\n\n**{conclusion(rows)}**"


def _cell(row: Mapping[str, str], key: str) -> str:
    tied = row["rung"] != RUNGS[0].name and is_tied(as_number(row[f"{key}_p_holm"]))
    return format_mean(as_number(row[f"{key}_mean"]), as_number(row[f"{key}_ci95"]), f" {SAME}" * tied)


def conclusion(rows: Sequence[Mapping[str, str]]) -> str:
    """Which rungs bring form, and which bring facts."""
    parts = []
    for key, what in (("json", "form comes"), ("fact", "facts come")):
        better = [
            row["rung"]
            for row in rows[1:]
            if not is_tied(as_number(row[f"{key}_p_holm"])) and row[f"{key}_minus"][0] != "-"
        ]
        parts.append(f"{what} with {', '.join(better)}" if better else f"{what.split()[0]} not decided")
    return f"Compared with a bare prompt: {'; '.join(parts)}."


def plot(experiment: Experiment, rows: Sequence[Mapping[str, str]]) -> bytes:
    """The perplexity of the answers of the two trained rows."""
    figure, [axes] = plotting.make_figure(width=5.6, height=1.6)
    names = [row["trained on"] for row in rows]
    means, halves = ([as_number(row[f"score_{part}"]) for row in rows] for part in ("mean", "ci95"))
    plotting.draw_forest(axes, names, means, halves)
    axes.set_xlabel(experiment.metric)
    return plotting.to_png(figure)


LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r"layers/(attn|mlp)/.*/kernel"}


def rows(alone: str, with_passage: str) -> tuple[Row, ...]:
    """Fine-tuning on the questions alone, and with their passages."""
    return (
        Row({"trained on": "questions"}, {"method": LORA, "data.template": alone}),
        Row({"trained on": "questions and passages"}, {"method": LORA, "data.template": with_passage}),
    )


SMALL = {
    "data.source": f"jsonl:{questions.FOLDER}",
    "data.completion": ANSWER,
    "data.truncate": "question",
    "data.seq_len": 192,
}
SQUAD = ASK + "Passage: {context}\n\nNews: {question}\nJSON:", ASK + "News: {question}\nJSON:"
PAPER = paper_runs.instructions(
    "llama2-7b",
    "tfds:squad",
    SQUAD[1],
    ' {{"answer": "{answers.text}"}}',
    steps=3000,
    batch_size=32,
    seq_len=512,
    warmup=100,
)
EXPERIMENT = Experiment(
    name="ladder",
    question="Does a model lack the form of an answer or its facts, and which rung of the ladder brings them?",
    metric="perplexity",
    baseline={"trained on": "questions"},
    small=Size(with_changes(tasks.headlines(), SMALL), rows(ALONE, WITH_PASSAGE), (1e-3, 3e-3), seeds=3, rate_seeds=1),
    paper=Size(PAPER, rows(SQUAD[1], SQUAD[0]), (1e-4, 3e-4), splits=("validation", "validation")),
    analyze=analyze,
    plot=plot,
    prepare=questions.write_questions,
    more=more,
)
get_study = EXPERIMENT.get_study
