"""Every kind of scaling beside worked numbers of its paper and of transformers, and what cannot be computed."""

import dataclasses

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.models.rope import RopeScaling, rope_frequencies
from lowrank.models.rope_scaling import KINDS
from tests.support.close import assert_close
from tests.support.tiny_models import decoder, run, tokens

YARN = RopeScaling("yarn", 4.0, original_positions=2048)
LONGROPE = RopeScaling("longrope", 4.0, original_positions=2048, short=(1.0, 1.0, 1.0, 1.0), long=(1.0, 1.5, 2.0, 4.0))
NUMBERS = {  # of 8 dimensions with theta 10000, in rows of 4096 tokens; the context of pre-training is 2048
    "linear": (RopeScaling("linear", 4.0), [0.25, 0.025, 0.0025, 0.00025]),
    "dynamic": (RopeScaling("dynamic", 4.0, original_positions=2048), [1, 0.05848035, 0.00341995, 0.0002]),
    "yarn": (YARN, [1, 0.1, 0.00625, 0.00025]),
    "yarn, exact cuts": (dataclasses.replace(YARN, truncate=False), [1, 0.1, 0.00505697, 0.00025]),
    "longrope": (LONGROPE, [1, 0.06666666, 0.005, 0.00025]),
}


def angles(scaling, length, width=8, theta=1e4):
    return np.asarray(rope_frequencies(width, theta, scaling, np.array([[length]]))).reshape(-1)


@pytest.mark.parametrize("name", NUMBERS)
def test_frequencies_are_the_worked_ones(name):
    scaling, expected = NUMBERS[name]
    assert_close(angles(scaling, 4096), expected, relative=4e-6, per_element=True)


def test_llama3_frequencies_are_the_worked_ones():
    scaling = RopeScaling("llama3", 8.0, original_positions=8192)
    expected = [1, 0.03760603, 5.2484616e-4, 6.6478699e-6]
    assert_close(angles(scaling, 1, theta=5e5), expected, relative=2e-6, per_element=True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_of_the_original_context_are_not_stretched(kind):
    scaling = NUMBERS[kind][0]
    np.testing.assert_array_equal(angles(scaling, 2048), rope_frequencies(8, 1e4))
    assert not np.array_equal(angles(scaling, 2049), rope_frequencies(8, 1e4))


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (YARN, 1.13862943),
        (dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0), 1.0),
        (dataclasses.replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=1.0), 0.92104235),
        (dataclasses.replace(YARN, mscale=0.707), 1.13862943),  # both or none
        (dataclasses.replace(YARN, attention_factor=1.5, mscale=1.0, mscale_all_dim=1.0), 1.5),
        (LONGROPE, 1.08711461),
        (RopeScaling("linear", 4.0), 1.0),
    ],
)
def test_cosines_are_multiplied_by_the_factor_of_attention(scaling, factor):
    assert_close(scaling.of_cosines, factor, relative=4e-8)


def test_the_factor_of_attention_multiplies_logits_by_its_square_at_every_length():
    """A model with YaRN in which nothing is interpolated is one of larger scores: `attn_scale * m ** 2`."""
    yarn = RopeScaling("yarn", 1.0, original_positions=16, attention_factor=1.5)
    scaled, params = decoder("llama", rope_scaling=yarn)
    larger, _ = decoder("llama", attn_scale=scaled.config.head_dim**-0.5 * 1.5**2)
    ids = tokens(2, 6)
    assert_close(run(scaled, params, ids), run(larger, params, ids))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (RopeScaling("yran", 4.0), r"unknown rope scaling 'yran' \(did you mean 'yarn'"),
        (RopeScaling("linear", 0.5), "'linear' has a factor below 1"),
        (RopeScaling("yarn", float("nan")), "'yarn' has a factor below 1"),
        (RopeScaling("yarn", 4.0, beta_fast=1.0, beta_slow=2.0), "'yarn' has a beta_fast of 1.0, below its beta_slow"),
        (RopeScaling("yarn", 4.0, attention_factor=0.0), "'yarn' has an attention factor of 0.0, not above 0"),
        (RopeScaling("yarn", 4.0, original_positions=0), "'yarn' has original positions below 2"),
        (RopeScaling("yarn", 1e30, original_positions=1e300), "'yarn' has a context beyond the positions of 32 bits"),
        (RopeScaling("llama3", 8.0, low=4.0, high=4.0), "'llama3' has a high frequency factor of 4.0, not above"),
        (RopeScaling("longrope", short=(1.0,) * 3, long=(1.0,)), "'longrope' has 1 factor in its long list, and rope"),
        (
            RopeScaling("longrope", short=(1.0, 1.0, 0.0), long=(1.0,) * 3),
            "a factor in its short list that is not above 0",
        ),
    ],
)
def test_numbers_that_rope_cannot_use_are_refused(scaling, message):
    with pytest.raises(UserError, match=message):
        decoder("llama", rope_scaling=scaling)


def test_a_row_may_have_the_positions_that_its_scaling_tells():
    config = decoder("llama", rope_scaling=dataclasses.replace(YARN, original_positions=32))[0].config
    assert (config.max_positions, config.max_length) == (32, 128)
    assert {k for k, v in KINDS.items() if v.tells_context} == {"yarn", "dynamic"}
