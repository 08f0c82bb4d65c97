import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from ml_collections import ConfigDict

from lowrank.core import config_schema
from lowrank.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    rate: float
    steps: tuple = ()
    most: int | None = None
    names: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    ranks: Mapping[str, int] | None = None
    scheme: Mapping[str, Any] | str | None = None


def test_a_config_group_becomes_a_dataclass_with_hashable_fields():
    assert config_schema.call_with_group(Group, ConfigDict({"rate": 0.1, "steps": [1, 2]}), "optim") == Group(
        0.1, (1, 2)
    )
    assert hash(config_schema.replace_fields(Group(0.1), {"steps": [3]}, "optim")) == hash(Group(0.1, (3,)))


def test_a_misspelt_key_is_named_with_the_nearest_valid_one():
    for change in (config_schema.call_with_group, config_schema.replace_fields):
        target = Group if change is config_schema.call_with_group else Group(0.1)
        with pytest.raises(UserError, match=r"'optim.raet' \(did you mean 'optim.rate'\?\)"):
            change(target, {"raet": 0.1}, "optim")


def test_a_required_key_is_named():
    with pytest.raises(UserError, match=r"optim\.rate is missing"):
        config_schema.call_with_group(Group, {}, "optim")


@pytest.mark.parametrize("rate", ["fast", True, None])
def test_a_mistyped_value_is_named(rate):
    with pytest.raises(UserError, match=f"optim.rate must be a float, not {rate!r}"):
        config_schema.call_with_group(Group, {"rate": rate}, "optim")


def test_an_int_will_do_for_a_float():
    assert config_schema.call_with_group(Group, {"rate": 1}, "optim").rate == 1


@pytest.mark.parametrize(
    ("wrong", "needed"),
    [
        ({"most": "x"}, "an int or None, not 'x'"),
        ({"most": 1.5}, "an int or None, not 1.5"),
        ({"names": "x"}, "a tuple[str, ...], not 'x'"),
        ({"names": ["x", 3]}, "a tuple[str, ...], not ('x', 3)"),
        ({"rates": [["x", "fast"]]}, "a tuple[tuple[str, float], ...], not (('x', 'fast'),)"),
        ({"rates": [["x"]]}, "a tuple[tuple[str, float], ...], not (('x',),)"),
        ({"ranks": 3}, "a Mapping[str, int] or None, not 3"),
        ({"ranks": {"q": "x"}}, "a Mapping[str, int] or None, not {'q': 'x'}"),
        ({"scheme": 3}, "a Mapping[str, Any] or a str or None, not 3"),
    ],
)
def test_a_value_is_held_to_the_whole_annotation(wrong, needed):
    [key] = wrong
    for change, target in ((config_schema.call_with_group, Group), (config_schema.replace_fields, Group(0.1))):
        with pytest.raises(UserError) as error:
            change(target, {"rate": 1, **wrong} if change is config_schema.call_with_group else wrong, "data")
        assert str(error.value) == f"data.{key} must be {needed}"


@pytest.mark.parametrize(
    "right",
    [{"most": None}, {"names": ["x"]}, {"rates": [["x", 2]]}, {"ranks": ConfigDict({"q": 1})}, {"scheme": {"x": 1}}],
)
def test_a_value_that_fits_its_annotation_is_taken(right):
    assert config_schema.call_with_group(Group, {"rate": 1, **right}, "data") == config_schema.replace_fields(
        Group(1), right, "data"
    )
