import dataclasses

import pytest
from ml_collections import ConfigDict

from lowrank import settings
from lowrank.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    rate: float
    steps: tuple = ()


def test_a_config_group_becomes_a_dataclass_with_hashable_fields():
    assert settings.call(Group, ConfigDict({"rate": 0.1, "steps": [1, 2]}), "optim") == Group(0.1, (1, 2))
    assert hash(settings.replace(Group(0.1), {"steps": [3]}, "optim")) == hash(Group(0.1, (3,)))


def test_a_misspelt_key_is_named_with_the_nearest_valid_one():
    for change in (settings.call, settings.replace):
        target = Group if change is settings.call else Group(0.1)
        with pytest.raises(UserError, match=r"'optim.raet' \(did you mean 'optim.rate'\?\)"):
            change(target, {"raet": 0.1}, "optim")


def test_a_required_key_is_named():
    with pytest.raises(UserError, match=r"optim\.rate is required"):
        settings.call(Group, {}, "optim")


@pytest.mark.parametrize("rate", ["fast", True, None])
def test_a_mistyped_value_is_named(rate):
    with pytest.raises(UserError, match=f"optim.rate must be a float, not {rate!r}"):
        settings.call(Group, {"rate": rate}, "optim")


def test_an_int_will_do_for_a_float():
    assert settings.call(Group, {"rate": 1}, "optim").rate == 1
