"""OFT and BOFT: their papers' formulas in float64, what keeps them orthogonal, and what they refuse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.core.errors import UserError
from lowrank.core.weight import dot, materialize
from tests.support.close import assert_close
from tests.support.weight_forms import shaken

L, IN, OUT = 2, 24, 5


def attached(**group):
    """One trained-looking layer of a random stack `[L, IN, OUT]`."""
    params = {"layers": {"attn": {"q": {"kernel": jax.random.normal(jax.random.key(0), (L, IN, OUT))}}}}
    method = methods.build_method({"target": ".*q/kernel", **group})
    w = shaken(methods.attach(method, params, jax.random.key(1))["layers"]["attn"]["q"]["kernel"], jax.random.key(2))
    return jax.tree.map(lambda leaf: leaf[1], w)


def skew(values, b):
    """Skew-symmetric matrices with `values` above the diagonal, row by row."""
    out = np.zeros((*values.shape[:-1], b, b))
    for n, (i, j) in enumerate(itertools.combinations(range(b), 2)):
        out[..., i, j], out[..., j, i] = values[..., n], -values[..., n]
    return out


def cayley(q):
    return (np.eye(len(q)) + q) @ np.linalg.inv(np.eye(len(q)) - q)


def holds(w, expected):
    assert_close(materialize(w), expected)
    assert_close(dot(jnp.eye(IN), w), expected)


@pytest.mark.parametrize("share", [False, True])
def test_oft_turns_the_inputs_block_by_block(share):
    w = attached(name="oft", block=4, share=share)
    q = skew(np.asarray(w.skew, np.float64), 4)
    rotation = np.zeros((IN, IN))
    for k in range(IN // 4):
        rotation[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = cayley(q[0 if share else k])
    assert_close(rotation @ rotation.T, np.eye(IN), relative=1e-12)
    holds(w, rotation @ np.asarray(w.base, np.float64))


def test_the_series_is_close_to_cayleys_transform_for_small_angles():
    w = attached(name="oft", block=4, terms=6)
    q = skew(np.asarray(w.skew, np.float64), 4)[0] * 0.1
    close = jax.tree.map(lambda x: x, w).__class__(base=w.base, skew=w.skew * 0.1, terms=6).rotation_blocks()[0, 0]
    assert_close(close, cayley(q), relative=1e-5)
    powers = [np.linalg.matrix_power(q, n) for n in range(6)]
    assert_close(close, powers[0] + 2 * sum(powers[1:5]) + powers[5])


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (2, 3), (6, 3)])
def test_boft_is_a_product_of_butterflies_and_a_scale(block, factors):
    """Factor i, of blocks of two halves: half j and half j + 2^i of every 2^(i + 1) halves are turned together."""
    w = attached(name="boft", block=block, factors=factors)
    q, half = skew(np.asarray(w.skew, np.float64), block), block // 2
    rotation = np.eye(IN)
    for i in range(factors):
        factor, k = np.zeros((IN, IN)), 0
        for start in range(0, IN // half, 2 ** (i + 1)):
            for j in range(2**i):
                first, second = (start + j) * half, (start + j + 2**i) * half
                at = [*range(first, first + half), *range(second, second + half)]
                factor[np.ix_(at, at)] = cayley(q[i, k])
                k += 1
        rotation = factor @ rotation
    assert_close(rotation @ rotation.T, np.eye(IN), relative=1e-12)
    reach = np.abs(rotation[:, 0]) > 1e-9
    assert reach.sum() == block * 2 ** (factors - 1)  # each input is mixed with the whole wide block
    holds(w, rotation @ np.asarray(w.base, np.float64) * np.asarray(w.s, np.float64))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "oft"}, "layers/attn/q/kernel: block 32 does not divide the 24 inputs"),
        ({"name": "oft", "block": 5}, "block 5 does not divide the 24 inputs"),
        ({"name": "oft", "block": 0}, "method.block must be positive"),
        ({"name": "oft", "block": 1}, "block 1 does not divide"),
        ({"name": "oft", "block": 4, "terms": 2}, "method.terms must be 0"),
        ({"name": "boft", "block": 8, "factors": 3}, "3 butterfly factors of block 8 need"),
        ({"name": "boft", "block": 3, "factors": 2}, "2 butterfly factors of block 3 need an even block"),
        ({"name": "boft", "factors": -1}, "method.factors must be positive"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)
