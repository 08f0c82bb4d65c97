"""Axes, and the cells that they make: keys are of what a run computes, and a wrong axis is named."""

import pytest

from configs import tiny
from lowrank.core.errors import UserError
from lowrank.sweeps.axes import axis, chain, combine, log_uniform, product, random_points, seeds, uniform
from lowrank.sweeps.cells import cell_key, make_cells


def key(**changes):
    """The key of the tiny config with changes, `group__key=value`."""
    config = tiny.get_config().to_dict()
    for name, value in changes.items():
        *groups, last = name.split("__")
        group = config
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return cell_key(config)


def test_axes_combine_as_product_zip_and_chain():
    a, b = axis("a", [1, 2]), axis("b", [3, 4])
    assert product(a, b) == ({"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4})
    assert combine(a, b) == ({"a": 1, "b": 3}, {"a": 2, "b": 4})
    assert chain(a, b) == ({"a": 1}, {"a": 2}, {"b": 3}, {"b": 4})
    assert product(chain(a, b), seeds(2, first=5))[:2] == ({"a": 1, "seed": 5}, {"a": 1, "seed": 6})
    with pytest.raises(UserError, match="these have 2 and 3 points"):
        combine(a, axis("b", [1, 2, 3]))
    with pytest.raises(UserError, match="two axes set a"):
        product(a, a)


def test_a_random_search_is_that_of_its_seed_and_has_no_point_twice():
    space = {"optim.lr": log_uniform(1e-5, 1e-1), "optim.final": uniform(0.0, 0.5), "method.rank": [1, 2, 4]}
    points = random_points(space, 200, seed=3)
    assert points == random_points(space, 200, seed=3) != random_points(space, 200, seed=4)
    assert points[:50] == random_points(space, 50, seed=3)
    assert all(1e-5 <= p["optim.lr"] <= 1e-1 and 0 <= p["optim.final"] <= 0.5 for p in points)
    assert 60 < sum(p["optim.lr"] < 1e-3 for p in points) < 140  # half of the logarithms
    assert {repr(p) for p in random_points({"a": [1, 2, 3]}, 3)} == {"{'a': 1}", "{'a': 2}", "{'a': 3}"}
    with pytest.raises(UserError, match="budget=4 finds 3 different points"):
        random_points({"a": [1, 2, 3]}, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__data": 4},
        {"checkpoint__every": 7},
        {"log_every": 3},
        {"loggers": ["wandb"]},
        {"notes": ["x"]},
        {"optim__name": "adamw"},
        {"optim__clip": 1},
        {"method__alpha": 4},
        {"method__rslora": False},
        {"objective": {"name": "causal_lm"}},
        {"data__prompt_loss_weight": 0.1},
        {"optim__lr": float("0.0100")},
        {"eval__before": False},
    ],
)
def test_the_key_is_the_same_for_one_computation_however_it_is_spelled(changes):
    assert key(**changes) == key()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 9},
        {"optim__lr": 0.011},
        {"method__rank": 3},
        {"checkpoint__best": "nll"},
        {"model__a": 1},
    ],
)
def test_the_key_differs_for_another_computation(changes):
    assert key(**changes) != key()


def test_a_cell_has_the_values_of_its_point():
    cells = make_cells(tiny.get_config(), product(axis("method", [{"name": "ia3"}]), axis("eval.split", ["test"])))
    assert cells[0].config["method"] == {"name": "ia3"}
    assert cells[0].config["eval"] == {"split": "test"}
    assert cells[0].label == "method=name=ia3 eval.split=test"
    assert cells[0].key == cell_key(cells[0].config)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (axis("optim.lrr", [1]), r"unknown axis 'optim.lrr' \(did you mean 'optim.lr'\?\)"),
        (axis("stpes", [1]), r"unknown axis 'stpes' \(did you mean 'steps'\?\)"),
        (axis("optm.lr", [1]), r"unknown axis 'optm.lr' \(did you mean 'optim.lr'\?\)"),
        (product(axis("seed", []), axis("steps", [1])), "the study has no cell: one of its axes is empty"),
        (axis("steps", [2, 2.0]), "two cells are the same run, .*: steps=2 and steps=2.0; leave one out"),
        (axis("log_every", [1, 2]), "two cells are the same run"),
    ],
)
def test_a_wrong_axis_is_named(points, message):
    with pytest.raises(UserError, match=message):
        make_cells(tiny.get_config(), points)
