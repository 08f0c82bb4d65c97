"""The shape of the tree: rooms and no loose modules, files that can be read at once, short functions."""

import ast
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOPS = ("lowrank", "configs", "experiments", "launch", "tests")
FILES = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 350, 60, 12  # lines


def function_lengths(paths: list[pathlib.Path]) -> dict[str, int]:
    """`{file:line name: lines}` of every function in the files."""
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return found


def test_no_file_is_too_long_to_be_read_at_once():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_short():
    lengths = function_lengths([path for path in FILES if path.is_relative_to(ROOT / "lowrank")])
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


def test_every_module_of_the_package_is_in_a_room():
    assert [path.name for path in (ROOT / "lowrank").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "lowrank").rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_every_room_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
