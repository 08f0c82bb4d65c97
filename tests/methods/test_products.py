"""LoHa, LoKr and HiRA: their papers' formulas in float64, their ranks by layer, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.errors import UserError
from lowrank.weight import dot, materialize
from tests.forms import shaken

L, IN, OUT = 3, 12, 8
X = np.random.default_rng(0).standard_normal((5, IN)).astype(np.float32)


def attached(**group):
    """The trained-looking form on a random stack `[L, IN, OUT]`."""
    base = jax.random.normal(jax.random.key(0), (L, IN, OUT))
    params = {"layers": {"attn": {"q": {"kernel": base}}}}
    method = methods.build({"target": r".*q/kernel", **group})
    return shaken(methods.attach(method, params, jax.random.key(1))["layers"]["attn"]["q"]["kernel"], jax.random.key(2))


def layer(w, i=0):
    return jax.tree.map(lambda leaf: leaf[i], w)


def float64(w):
    return {f.name: np.asarray(getattr(w, f.name), np.float64) for f in dataclasses.fields(w)}


def holds(w, expected):
    np.testing.assert_allclose(materialize(w), expected, atol=1e-5)
    np.testing.assert_allclose(dot(jnp.asarray(X), w), X @ expected, atol=1e-4)


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


@pytest.mark.parametrize("name", ["loha"])
def test_ranks_and_alphas_follow_patterns(name):
    patterns = {"rank_pattern": {r"layers/1/.*": 2, r"layers/2/.*": 0}, "alpha_pattern": {r"layers/1/.*": 5.0}}
    w = attached(name=name, rank=3, alpha=6.0, **patterns)
    np.testing.assert_allclose(w.scale[:2], [2, 2.5])
    changes = [np.linalg.matrix_rank(np.asarray(materialize(w)[i] - w.base[i]), 1e-4) for i in range(L)]
    assert changes == [8, 4, 0]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "loha", "rank": 0}, "method.rank must be positive"),
        ({"name": "loha", "rank": 9}, r"rank 9 is larger than min\(in, out\) = 8"),
        ({"name": "loha", "alpha": -1.0}, "method.alpha must be positive"),
        ({"name": "loha", "rank_pattern": {".*": 0}}, "every layer of .* has rank 0"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)
