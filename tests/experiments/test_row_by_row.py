"""Studies whose rows are run one at a time: what is recorded is not run again, and the tables say what the runs did."""

import csv
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from experiments.methods import headlines, table, topics
from experiments.protocol import measures, row_by_row
from experiments.protocol.model import right_answers
from experiments.protocol.record import CELLS_FILE
from experiments.protocol.row_by_row import Task
from experiments.quantization import __main__ as quantization
from experiments.quantization import bases
from experiments.quantization import table as quantization_table
from launch import sweep
from lowrank import pretrained
from lowrank.core.paths import as_path
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.worker import Worker
from tests.support import dummy_cells
from tests.support.close import assert_close

FAKE = """
    cells = json.loads((folder.parents[1] / "study.json").read_text())["cells"]
    config = next(cell["config"] for cell in cells if cell["key"] == key)
    lr, full = config["optim"]["lr"], config["method"]["name"] == "full"
    if DIVERGES and full:
        print("error: loss is nan", file=sys.stderr)
        sys.exit(3)
    lines = [{"step": 1, "seconds": 1.0, "train/loss": 1.0}, {"step": 2, "seconds": 1.5, "train/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "trained.safetensors").write_bytes(bytes(2048))
    score = 0.5 + lr + 0.01 * (seed % 100) - 0.1 * full * (1 + seed % 100)
    finish(trained_params=7, seconds=1.0, peak_host_bytes=2**21, after={"accuracy": score, "perplexity": score})
"""
ANSWERS = {"lora": "1110", "full": "1000"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(tasks, write, *words)`: the command of a ci study with cells by a formula in place of training; its code."""

    def run_cells(script, words):
        options = dict(word.removeprefix("--").split("=", 1) for word in words)
        study = open_study(sweep.load_study(options["study"]), as_path(options["folder"]))
        code = Worker(study, dummy_cells.command(script), say=lambda line: None, poll=0.01).run()
        ran.append(len(study.cells))
        return code

    def command(tasks, write, *words, diverges=False):
        script = FAKE.replace("DIVERGES", str(diverges))
        monkeypatch.setattr(sweep, "main", functools.partial(run_cells, script))
        common = ["--size=ci", f"--folder={tmp_path}/sweeps", f"--results={tmp_path}/results"]
        return row_by_row.main("methods", tasks, write, [*common, *words])

    ran = command.ran = []
    load = lambda config, adapter=None: SimpleNamespace(run=ConfigDict(config))  # noqa: E731
    for module in (measures, row_by_row):
        monkeypatch.setattr(module, "load_model", load)
    return command


def answer(model, split):
    assert split == "test+validation[:100]"
    return [each == "1" for each in ANSWERS[model.run.method.name]]


TOPICS = {"topics": Task(topics.EXPERIMENT, lambda model: 30.0 if model.run.steps else 50.0, answer)}


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_is_searched_trained_and_compared_and_runs_only_once(run, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    old = dict.fromkeys(table.COLUMNS[:13], "1") | {"family": "selective", "task": "topics"}
    (results / table.EARLIER_FILE).write_text(
        ",".join(old) + "\n" + "".join(",".join((old | {"method": name}).values()) + "\n" for name in ("lora", "full"))
    )
    assert run(TOPICS, table.write, "--rows=lora") == 0
    lora, full = rows_of(results / "table.csv")
    assert tuple(lora) == table.COLUMNS
    assert [(row["method"], row["seeds"], row["earlier"]) for row in (lora, full)] == [
        ("lora", "3", "False"),
        ("full", "1", "True"),
    ]
    assert (lora["lr"], lora["lr_at_edge"], lora["step_s"], lora["adapter_kb"]) == ("0.01", "True", "0.5", "2")
    assert (lora["peak_mb"], lora["forgetting"], lora["minus_lora_mean"]) == ("2", "20", "nan")
    assert not (tmp_path / "sweeps" / "topics" / "lora").exists()
    assert run(TOPICS, table.write) == 0
    assert run.ran == [2, 3, 2, 3]  # of LoRA once
    lora, full = rows_of(results / "table.csv")
    differences = -0.1 * np.array([1.0, 2.0, 3.0]) + float(full["lr"]) - 0.01
    assert_close(float(full["minus_lora_mean"]), differences.mean(), relative=1e-5)
    assert_close(float(full["minus_lora_ci95"]), stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3), relative=1e-5)
    items = np.array([0.0, -1.0, -1.0, 0.0])
    assert_close(float(full["minus_lora_articles_ci95"]), stats.t.ppf(0.975, 3) * items.std(ddof=1) / 2, relative=1e-5)
    assert "Not decided" in capsys.readouterr().out
    assert (results / "topics.png").stat().st_size > 1000
    assert r"full & selective & topics" in (results / "table.tex").read_text()
    assert run(TOPICS, table.write, "--workers=0") == 0
    assert len(run.ran) == 4


def test_a_row_of_which_every_rate_diverges_is_left_out(run, tmp_path, capsys):
    assert run(TOPICS, table.write, diverges=True) == 1
    assert "full: no learning rate gave a score, lower its rates" in capsys.readouterr().out
    assert [row["method"] for row in rows_of(tmp_path / "results" / "table.csv")] == ["lora"]
    assert [line["score"] for line in rows_of(tmp_path / "results" / CELLS_FILE) if line["row"] == "full"] == [
        "nan"
    ] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows=lara"], "unknown row 'lara' (did you mean 'lora'?)"),
        (["--task=topic"], "unknown task 'topic' (did you mean 'topics'?)"),
        (["--row=lora"], "--row"),
    ],
)
def test_an_unknown_row_or_task_is_refused(run, words, message, capsys):
    assert run(TOPICS, table.write, *words) == 2
    assert message in capsys.readouterr().err


def test_a_base_is_scored_untuned_once_and_stands_before_what_is_tuned_on_it(run, tmp_path, monkeypatch, files):
    loaded = []
    monkeypatch.setattr(bases, "load", lambda model: loaded.append(model) or pretrained.load(str(files / "llama")))
    monkeypatch.setattr(bases, "bits_under", lambda config: 32.0)
    monkeypatch.setattr(quantization_table, "bits_under", lambda config: 32.0)
    monkeypatch.setitem(bases.UNTUNED, "headlines", lambda model: 70.0)
    tasks = {"headlines": quantization.TASKS["headlines"]}
    assert run(tasks, quantization_table.write) == 0
    assert run(tasks, quantization_table.write) == 0
    found = rows_of(tmp_path / "results" / "table.csv")
    assert tuple(found[0]) == quantization_table.COLUMNS
    assert [(row["base"], row["method"], row["bits_per_weight"]) for row in found] == [
        ("float32", "none", "32"),
        ("bfloat16", "none", "32"),
        ("float32", "lora", "32"),
        ("bfloat16", "lora", "32"),
    ]
    assert [row["score_mean"] for row in found[:2]] == ["70", "70"]
    assert [model.get("param_dtype", "float32") for model in loaded] == ["float32", "bfloat16"]
    assert run.ran == [3, 3]  # one rate is no choice
    assert (tmp_path / "results" / "headlines.png").stat().st_size > 1000


def test_the_right_answers_are_those_of_the_accuracy(files):
    config = topics.EXPERIMENT.get_study("ci,rates").cells()[0].config
    group = config["data"] | {"source": f"jsonl:{files / 'records.jsonl'}", "split": "train", "batch_size": 4}
    config |= {"method": {"name": "full"}, "data": group, "eval": {"split": "train", "max_examples": 0}}
    config["model"] |= {"name": str(files / "bert"), "num_labels": 2}
    found = measures.load_model(config)
    head = found.base.params["head"]
    head["kernel"] = jax.random.normal(jax.random.key(0), head["kernel"].shape)
    right = right_answers(found, "train")
    assert 0 < right.sum() < len(right)
    assert_close(right.mean(), found.score("train")["accuracy"], relative=1e-6)


@pytest.mark.parametrize("study", [topics.EXPERIMENT, headlines.EXPERIMENT])
def test_every_row_of_a_task_makes_runs(study):
    for size, phase in (("ci", "rates"), ("small", "rates")):
        assert study.get_study(f"{size},{phase}").cells()
    assert study.get_study("small,rates,,lora").baseline is None
