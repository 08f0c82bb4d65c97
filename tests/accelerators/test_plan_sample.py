"""The plan that the README shows is what the command says today, in the column that no compiler has a say in."""

import re

from experiments.plan.__main__ import RESULTS, sample


def by_formula(text):
    """`(name, bytes)` of the table's rows."""
    return re.findall(r"^ *(\w.*?)  +(\S+ [kMG]B)(?=\s|$)", text, flags=re.MULTILINE)


def test_the_readme_shows_what_the_plan_says_today():
    shown = by_formula(RESULTS.read_text())
    assert len(shown) == 11
    assert shown == by_formula(sample())
