"""VeRA: its paper's formula in float64, and what the weights share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import dot, materialize, merge
from tests.support.close import assert_close

L, RANK = 2, 6


def params():
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)  # noqa: E731
    return {"layers": {"q": {"kernel": draw(0, L, 8, 4)}, "v": {"kernel": draw(1, L, 5, 7)}}}


def attached(**group):
    method = methods.build_method({"name": "vera", "rank": RANK, "target": ".*/kernel", **group})
    start = methods.attach(method, params(), jax.random.key(1))
    move = lambda name, x: x + (0.5 * jnp.sin(jnp.arange(x.size) + 1.0)).reshape(x.shape) if "lambda" in name else x  # noqa: E731
    return method, tree.map_named(move, start)


@pytest.mark.parametrize("name", ["q", "v"])
def test_it_keeps_the_formula_of_the_paper_in_float64(name):
    method, moved = attached()
    a, b = (np.asarray(moved["shared"][f], np.float64) for f in "ab")
    assert (a.shape, b.shape) == ((8, RANK), (RANK, 7))
    stack = method.bind(moved, None, None)["layers"][name]["kernel"]
    for i in range(L):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        base, d, scale = (np.asarray(x, np.float64) for x in (w.base, w.lambda_d, w.lambda_b))
        n_in, n_out = base.shape
        expected = base + a[:n_in] @ np.diag(d) @ b[:, :n_out] @ np.diag(scale)
        assert_close(materialize(w), expected)
        assert_close(dot(jnp.eye(n_in), w), expected)


def test_what_is_shared_comes_from_the_seed_alone_and_leaves_the_tree_that_the_model_sees():
    _, one = attached(seed=3)
    method, other = attached(seed=3)
    np.testing.assert_array_equal(one["shared"]["a"], other["shared"]["a"])
    assert not np.array_equal(one["shared"]["a"], attached(seed=4)[1]["shared"]["a"])
    assert tree.leaf_names(merge(method.bind(other, None, None))) == tree.leaf_names(params())


def test_it_starts_as_the_base():
    method = methods.build_method({"name": "vera", "rank": RANK, "target": ".*/kernel"})
    start = method.bind(methods.attach(method, params(), jax.random.key(1)), None, None)
    jax.tree.map(np.testing.assert_array_equal, merge(start), params())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 0}, "method.rank must be positive"),
        ({"d_initial": 0.0}, "method.d_initial must not be 0"),
        ({"target": ".*/kernle"}, "matches no leaf"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)


def test_an_unbound_weight_says_what_it_lacks():
    _, moved = attached()
    with pytest.raises(UserError, match="apply the method's `bind` first"):
        merge(moved)
