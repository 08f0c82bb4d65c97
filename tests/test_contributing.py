"""CONTRIBUTING.md followed to the letter in a copy of the repository: what it adds keeps every law, and trains."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("configs", "experiments", "launch", "lowrank", "tests")
BLOCKS = re.findall(
    r'^```(python|diff) title="(\S+)"\n(.*?)^```$', (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
)
# The contract tests that read the tables, and the words that choose, of all of them together, what the guide adds.
CONTRACTS = {
    "tests/weights/test_laws.py": "column",
    "tests/numerics/test_forms.py": "column",
    "tests/methods/test_methods.py": "trains_exactly_what_it_names",
    "tests/objectives/test_contract.py": "row_mean and (add_up or declares or scores)",
    "tests/numerics/test_objectives.py": "row_mean and float64 or every_objective_has_a_case",
    "tests/experiments/test_methods_study.py": "every_method_has_a_row",
    "tests/test_imports.py": "imports_point_one_way or file_of_its_name",
}


def insert(text: str, diff: str) -> str:
    """`text` with each line of `diff` that starts with + after the line that comes before it there."""
    lines, at = text.splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at, line[1:])
        else:
            at = lines.index(line[1:], at)
        at += 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cells"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for kind, name, body in BLOCKS:
        path = folder / name
        assert path.exists() == (kind == "diff"), name
        path.write_text(insert(path.read_text(), body) if kind == "diff" else body)
    return folder


def python(folder: Path, *words: str) -> str:
    """The output of `python -m WORDS` in the folder; it must succeed."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_addition_is_one_file_and_one_line_of_its_table():
    for kind, name, body in BLOCKS:
        added = [line for line in body.splitlines() if line.startswith("+") and not line.startswith("+from")]
        assert kind == "python" or not name.startswith("lowrank/") or len(added) == 1, name


def test_the_code_of_the_guide_is_formatted(copy):
    names = [name for _, name, _ in BLOCKS]
    python(copy, "ruff", "check", "-q", *names)
    python(copy, "ruff", "format", "--check", "-q", *names)


def test_the_additions_keep_the_contracts(copy):
    chosen = " or ".join(CONTRACTS.values())
    out = python(copy, "pytest", "-n", "0", "-p", "no:cacheprovider", "-vv", "-k", chosen, *CONTRACTS)
    for name in CONTRACTS:
        assert f"{name}::" in out, name


def test_the_additions_train(copy, files):
    sources = f"--config.model.name={files / 'llama'}", f"--config.data.source=jsonl:{files / 'records.jsonl'}"
    words = "--config=configs/tiny.py:method=column_offset", "--config.objective=row_mean", "--config.optim.lr=0.1"
    python(copy, "launch.main", *words, "--workdir=run", *sources)
    losses = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in losses if "train/loss" in line]
    assert losses[-1] < 0.98 * losses[0]
    assert json.loads((copy / "run" / "adapter" / "trained.json").read_text())["method"]["name"] == "column_offset"
