"""The study of long contexts on a tiny model: every part runs once, and a table tells what was found."""

import json

import pytest

from experiments.long_context import command, sizes, table, texts
from experiments.protocol.table import read_rows
from lowrank.core.errors import UserError
from tests.support.close import assert_close

SIZE = sizes.SIZES["ci"]
ARTICLE = "Ministers met in London on Monday. The market rose, and the team won again. Nobody was hurt. " * 20


@pytest.mark.all
def test_every_part_runs_once_and_the_tables_have_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "articles", lambda split: [f"{split} {i}\n\n{ARTICLE}" for i in range(6)])
    folder, results = tmp_path / "models", tmp_path / "results"
    command.run(SIZE, folder)
    table.write_tables(SIZE, folder, results)
    rows = read_rows(results / "table.csv")
    assert [row["way"] for row in rows] == ["base", "none", "yarn", "yarn, tuned"]
    assert [row["context"] for row in rows] == ["288", "576", "576", "576"]
    assert {row["seeds"] for row in rows} == {"1"}
    positions = [row for row in read_rows(results / "positions.csv") if row["way"] == "yarn"]
    assert [row["last"] for row in positions] == ["144", "288", "432", "576"]
    assert {row["way"] for row in read_rows(results / "retrieval.csv")} == {"base"}
    assert (results / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(command, "scores", lambda *rest, **how: pytest.fail("scored again"))
    command.run(SIZE, folder)


def scored(perplexity, shares):
    """The scores of a model by hand, with the shares found at the lengths of the study."""
    cells = [
        {"task": "passkey", "length": n, "depth": 0.0, "prompts": 4, "found": x}
        for n, x in zip(SIZE.lengths, shares, strict=False)
    ]
    positions = [{"first": 1, "last": 576, "tokens": 9, "nll": 1.0, "perplexity": perplexity}]
    return {"old": 1.0, "positions": positions, "cells": cells}


def write(folder, base):
    """The scores of all models, of which `base` are the shares that the base finds."""
    for name, perplexity in (("none", 50.0), ("yarn", 20.0), ("yarn-tuned", 10.0)):
        (folder / f"{name}.json").write_text(json.dumps(scored(perplexity, (1.0, 0.5, 0.25) if base[0] > 0.9 else ())))
    (folder / "base.json").write_text(json.dumps(scored(12.0, base)))


def test_a_base_that_finds_enough_brings_heat_maps_and_another_its_figure(tmp_path):
    write(tmp_path, (1.0, 1.0))
    table.write_tables(SIZE, tmp_path, tmp_path / "enough")
    assert (tmp_path / "enough/retrieval.png").exists()
    rows = read_rows(tmp_path / "enough/table.csv")
    assert_close([float(rows[2][key]) for key in ("found_within", "found_beyond")], [0.75, 0.25])
    assert "finds 100% of the pass keys. The least perplexity of the last positions, 10.00, is that of yarn, tuned" in (
        table.conclusion(rows)
    )
    write(tmp_path, (0.5, 0.0))
    table.write_tables(SIZE, tmp_path, tmp_path / "few")
    assert not (tmp_path / "few/retrieval.png").exists()
    assert "finds 25% of the pass keys, fewer than 90%, so that no way is asked" in table.markdown(tmp_path / "few")
    (tmp_path / "none.json").unlink()
    with pytest.raises(UserError, match=r"none\.json is missing: run the study with --workers=1"):
        table.write_tables(SIZE, tmp_path, tmp_path / "few")


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match=r"unknown size 'smal' \(did you mean 'small'"):
        sizes.get_size("smal")
