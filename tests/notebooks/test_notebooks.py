"""The notebooks run from top to bottom. With TRIM_NOTEBOOKS, a cell's `trimmed` metadata run after it: fewer steps."""

import json
import os
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 40_000  # bytes of a notebook with its outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs_from_top_to_bottom_and_defines_no_functions(path, monkeypatch):
    monkeypatch.syspath_prepend("")  # what a notebook adds is taken away again
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources
    assert not [source for source in sources if "def " in source or "class " in source]
    assert path.stat().st_size <= LARGEST
    names = {}
    for cell, source in zip(cells, sources, strict=True):
        exec(compile(source, str(path), "exec"), names)
        if os.environ.get("TRIM_NOTEBOOKS"):
            exec(cell["metadata"].get("trimmed", ""), names)
