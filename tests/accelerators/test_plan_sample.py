"""The plan that the documentation shows is that of the command, in the column that no compiler has a say in."""

import re

from experiments.plan.__main__ import RESULTS, sample


def by_formula(text):
    """`(name, bytes)` of the table's rows."""
    return re.findall(r"^ *(\w.*?)  +(\S+ [kMG]B)(?=\s|$)", text, flags=re.MULTILINE)


def test_the_documentation_shows_the_plan_of_the_command():
    shown = by_formula(RESULTS.read_text())
    assert len(shown) == 11
    assert shown == by_formula(sample())
