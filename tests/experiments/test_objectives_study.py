"""The study of objectives: its rule, the numbers of a row, and the tables that are made of them."""

import dataclasses

import pytest

from experiments.objectives import command, pairs, table
from experiments.protocol.table import read_rows
from lowrank.core.errors import UserError
from lowrank.core.files import write_json
from tests.support.close import assert_close

ARTICLE = "The central bank has raised interest rates for the first time in four years, economists said."
LINES = {
    "Bank raises interest rates": True,
    "  Bank raises rates": True,
    "": False,
    "Bank raises interest rates to its highest in four long years": False,  # nine words and more
    "Bank raises interest rates.": False,
    '"Bank raises interest rates"': False,
    "BANK RAISES INTEREST RATES": False,
    "Bank raises\ninterest rates": False,
    "Holmes breaks hurdles record": False,  # of another article
    "A to Z": False,  # no word that could be of the article
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_follows_the_rule_if_it_is_a_brief_headline_of_its_article(line):
    assert pairs.follows_rule(line, ARTICLE) is LINES[line]


def test_a_rejected_line_breaks_the_demand_of_its_kind():
    record, other = ({"title": title, "text": f"{ARTICLE} More."} for title in ("Bank raises rates", "Holmes wins"))
    rejected = {kind: pairs._rejected(kind, record, other) for kind in pairs.KINDS}
    assert rejected == {"quality": "Holmes wins", "brevity": ARTICLE, "format": '"BANK RAISES RATES"'}
    assert not any(pairs.follows_rule(line, pairs.shown(record)) for line in rejected.values())


@pytest.fixture
def numbers(tmp_path):
    """Made-up numbers of every row: the second row is better than the baseline on each seed, the third no other."""
    part, size = command.PARTS["preferences"], dataclasses.replace(command.SIZES["ci"], seeds=3)
    for i, row in enumerate((table.START, *part.rows)):
        for seed in range(size.seeds if i else 1):
            value = 0.5 + (0.1 + 0.001 * seed) * (i == 2) + 0.01 * ((seed + i * (i > 2)) % 3)
            file = table.path(tmp_path / "runs", part, row, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, dict.fromkeys(part.headings, value))
    return part, size, tmp_path


def test_a_table_marks_what_the_seeds_cannot_tell_from_the_baseline(numbers):
    part, size, folder = numbers
    table.write_table(part, size.seeds, folder / "runs", folder / "results")
    rows = {row["row"]: row for row in read_rows(folder / "results/preferences.csv")}
    assert [row["seeds"] for row in rows.values()] == ["1", *["3"] * len(part.rows)]
    assert_close(float(rows["IPO"]["rule_minus"]), 0.101)
    text = command.markdown(folder / "results")
    better, tied = (
        next(line for line in text.splitlines() if line.startswith(f"| {row} ")) for row in ("IPO", "SimPO")
    )
    assert "≈" not in better
    assert tied.count("≈") == len(part.headings)
    assert "generated lines that follow the rule: IPO better;" in text
    assert (folder / "results/preferences.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_has_not_run_is_named(numbers):
    part, size, folder = numbers
    table.path(folder / "runs", part, "ORPO", 1).unlink()
    with pytest.raises(UserError, match=r"preferences-orpo-1\.json is missing: run the study with --workers=1"):
        table.write_table(part, size.seeds, folder / "runs", folder / "results")
