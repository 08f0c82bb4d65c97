"""Laws of strangers' regular expressions: they match as those of `re` do, and end."""

import re
import time

import pytest

from lowrank.core import bounded_regex
from lowrank.core.errors import UserError

PATH = "model.layers.0.self_attn.q_proj"
SLOW = r"((.|\w)+)+[0-8]{3}"


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r"^(?!.*visual).*q_proj$", r"model\.layers\.[\d]{1,}\..*", "x"])
def test_a_pattern_matches_as_it_does_in_re(pattern):
    for name in ("match", "fullmatch"):
        assert bool(getattr(bounded_regex, name)(pattern, PATH)) == bool(getattr(re, name)(pattern, PATH))


def test_a_pattern_without_end_is_an_error_in_time():
    start = time.process_time()
    with pytest.raises(UserError, match="takes too long to match"):
        bounded_regex.fullmatch(SLOW, PATH)
    assert time.process_time() - start < 2 * bounded_regex.SECONDS


def test_the_matches_of_a_budget_share_it():
    with bounded_regex.budget(0.0), pytest.raises(UserError, match="takes too long"):
        bounded_regex.match("a", "a")
    with bounded_regex.budget():
        assert bounded_regex.match("a", "a")


def test_what_is_no_pattern_is_named():
    with pytest.raises(UserError, match=r"pattern '\(' is not a regular expression"):
        bounded_regex.match("(", "a")
