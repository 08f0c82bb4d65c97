"""The room's docstring names the files through which a step and the parameters go: they exist, and they are few."""

import ast
import re
from pathlib import Path

import pytest

import lowrank
from lowrank import training

ROOT = Path(lowrank.__file__).parent
MOST_FILES = {"A reader follows one step": 4, "The parameters, `params`,": 12}


def entries_of(heading):
    """`[(file, names that the sentence quotes)]` of the list below a heading of the docstring."""
    below = training.__doc__[training.__doc__.index(heading) :].split("\n\n")[1]
    items = re.findall(r"^\d+\. `(\S+\.py)`: (.+)$", below, re.MULTILINE)
    return [(file, re.findall(r"`(\w+)`", sentence)) for file, sentence in items]


def defined_names(file):
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("heading", MOST_FILES)
def test_the_files_are_few_and_define_the_functions(heading):
    entries = entries_of(heading)
    assert 0 < len({file for file, _ in entries}) == len(entries) <= MOST_FILES[heading]
    assert all(names for _, names in entries)
    assert not {(file, name) for file, names in entries for name in names if name not in defined_names(file)}


def test_each_file_of_the_step_calls_a_function_of_the_next_one():
    step = entries_of("A reader follows one step")
    calls = [("loop.py", "self.run.step("), ("run.py", "step.make_step("), ("run.py", "self.objective.loss(")]
    assert all(call in (ROOT / "training" / file).read_text() for file, call in calls)
    assert [file for file, _ in step][-1].startswith("objectives/")
