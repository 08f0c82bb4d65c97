"""LoHa, LoKr and HiRA: their papers' formulas in float64, their ranks by layer, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core.errors import UserError
from lowrank.core.weight import dot, materialize
from lowrank.weights import lokr
from tests.support.close import assert_close
from tests.support.weight_forms import shaken

L, IN, OUT = 3, 12, 8
X = np.random.default_rng(0).standard_normal((5, IN)).astype(np.float32)


def attached(**group):
    """The trained-looking form on a random stack `[L, IN, OUT]`."""
    base = jax.random.normal(jax.random.key(0), (L, IN, OUT))
    params = {"layers": {"attn": {"q": {"kernel": base}}}}
    method = methods.build_method({"target": r".*q/kernel", **group})
    return shaken(methods.attach(method, params, jax.random.key(1))["layers"]["attn"]["q"]["kernel"], jax.random.key(2))


def layer(w, i=0):
    return jax.tree.map(lambda leaf: leaf[i], w)


def float64(w):
    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    return {name: np.asarray(x, np.float64) for name, x in fields.items() if x is not None}


def holds(w, expected):
    assert_close(materialize(w), expected)
    assert_close(dot(jnp.asarray(X), w), X @ expected)


@pytest.mark.parametrize("rank", [2, 5])
def test_loha_keeps_the_formula_of_fedpara_in_float64(rank):
    w = layer(attached(name="loha", rank=rank, alpha=3))
    p = float64(w)
    update = np.zeros((IN, OUT))
    for i in range(IN):
        for o in range(OUT):
            update[i, o] = (p["a1"][i] @ p["b1"][:, o]) * (p["a2"][i] @ p["b2"][:, o])
    holds(w, p["base"] + 3 / rank * update)
    assert np.linalg.matrix_rank(update) == min(rank**2, OUT)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"rank": 2}, ("w1", "w2")),
        ({"rank": 1}, ("w1", "a2", "b2")),
        ({"rank": 1, "decompose_both": True}, ("a1", "b1", "a2", "b2")),
        ({"rank": 2, "factor": 2}, ("w1", "a2", "b2")),
        ({"rank": 1, "factor": 4, "decompose_both": True}, ("a1", "b1", "a2", "b2")),
    ],
)
def test_lokr_keeps_the_kronecker_product_in_float64(options, fields):
    w = layer(attached(name="lokr", alpha=3, **options))
    p = float64(w)
    assert {f for f in p if f[0] in "abw" and f != "base" and p[f].ndim} == set(fields)
    w1, w2 = (p[f"w{i}"] if f"w{i}" in fields else p[f"a{i}"] @ p[f"b{i}"] for i in (1, 2))
    holds(w, p["base"] + 3 / options["rank"] * np.kron(w1, w2))


@pytest.mark.parametrize(
    ("size", "factor", "parts"),
    [(12, -1, (3, 4)), (12, 6, (6, 2)), (12, 5, (3, 4)), (12, 8, (3, 4)), (30, 4, (3, 10)), (7, -1, (1, 7))],
)
def test_lokr_divides_a_side_at_the_factor_or_at_the_root(size, factor, parts):
    assert lokr.split_dimension(size, factor) == parts


def test_hira_keeps_the_formula_of_its_paper_in_float64():
    w = layer(attached(name="hira", rank=3))
    p = float64(w)
    holds(w, p["base"] + p["base"] * (p["a"] @ p["b"]))


def test_hira_keeps_no_kernel_for_the_backward_pass():
    w = layer(attached(name="hira", rank=2))
    _, pull = jax.vjp(lambda a, b: dot(jnp.asarray(X), dataclasses.replace(w, a=a, b=b)), w.a, w.b)
    assert sum(leaf.shape == (IN, OUT) for leaf in jax.tree.leaves(pull)) <= 1  # the base itself


@pytest.mark.parametrize("name", ["loha"])
def test_ranks_and_alphas_follow_patterns(name):
    patterns = {"rank_pattern": {r"layers/1/.*": 2, r"layers/2/.*": 0}, "alpha_pattern": {r"layers/1/.*": 5.0}}
    w = attached(name=name, rank=3, alpha=6.0, **patterns)
    assert_close(w.scale[:2], [2, 2.5])
    changes = [np.linalg.matrix_rank(np.asarray(materialize(w)[i] - w.base[i]), 1e-4) for i in range(L)]
    assert changes == [8, 4, 0]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "loha", "rank": 0}, "method.rank must be positive"),
        ({"name": "loha", "rank": 9}, r"rank 9 is larger than min\(in, out\) = 8"),
        ({"name": "lokr", "factor": 0}, "method.factor must be -1 or at least 1, not 0"),
        ({"name": "lokr", "rank": 1, "rank_pattern": {"layers/1/.*": 4}}, "attn/q/kernel: ranks 1 to 4 in one stack"),
        ({"name": "hira", "rank": -2}, "method.rank must be positive"),
        ({"name": "loha", "alpha": -1.0}, "method.alpha must be positive"),
        ({"name": "loha", "rank_pattern": {".*": 0}}, "every layer of .* has rank 0"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)
