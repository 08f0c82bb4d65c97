"""A context longer than the base's: every way to stretch rope to it, and what cannot be stretched."""

import pytest

from lowrank.core.errors import UserError
from lowrank.models.context import STRETCHES, as_own, stretched_rope
from lowrank.models.rope import RopeScaling, rope_frequencies
from tests.support.close import assert_close
from tests.support.tiny_models import SIZES, decoder, encoder, run, tokens

LONG = 4 * SIZES["max_positions"]
OPTIONS = {name: {"rope": name, "context": LONG} for name in STRETCHES}
OPTIONS["abf"] |= {"context_theta": 5e5}


@pytest.mark.parametrize("name", STRETCHES)
def test_a_stretched_model_is_the_one_that_has_the_context_by_itself(name):
    config = decoder("llama", **OPTIONS[name])[0].config
    own = as_own(config)
    assert (config.max_length, own.max_length, own.context) == (LONG, LONG, 0)
    assert own.ropes == config.ropes != decoder("llama")[0].config.ropes
    assert as_own(own) is own


def test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest():
    config = decoder("llama", **OPTIONS["ntk"])[0].config
    theta, scaling = stretched_rope(config)
    ratio = rope_frequencies(config.head_dim, config.rope_theta) / rope_frequencies(config.head_dim, theta)
    assert scaling is None
    assert_close([ratio[0], ratio[-1]], [1.0, 4.0])
    eight = decoder("llama", head_dim=8, **OPTIONS["ntk"])[0].config
    assert_close(stretched_rope(eight)[0], 63496.042, relative=4e-8)


def test_rows_may_be_as_long_as_the_context():
    model, params = decoder("llama", rope="yarn", context=48)
    assert run(model, params, tokens(1, 48)).shape[1] == 48
    with pytest.raises(UserError, match="a sequence of 49 tokens is longer than the model's 48 positions"):
        run(model, params, tokens(1, 49))


YARN = RopeScaling("yarn", 4.0, original_positions=8)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"rope": "yran"}, r"unknown model.rope 'yran' \(did you mean 'yarn'"),
        ("llama", {"context": 16}, "model.context=16 does not extend the base, which has 32 positions"),
        ("llama", {"context": -1}, "context=-1 is below 0"),
        ("llama", {"context": 64, "rope_scaling": YARN}, "scaled already, by 'yarn', and scalings do not stack"),
        ("llama", {"position_factor": 2.0, "rope_scaling": YARN}, "do not stack: leave out model.position_factor=2.0"),
        ("llama", {"position_factor": 2.0, "context": 64}, "both stretch rope: leave one out"),
        ("llama", {"context": 64, "rope": "abf"}, "model.rope=abf needs a theta above the base's 10000.0"),
        ("llama", {"context": 64, "context_theta": 5e5}, "model.context_theta is the theta of model.rope=abf"),
        ("llama", {"context": 64, "rope": "ntk", "rotary_dim": 2}, "model.rope=ntk needs more than one frequency"),
        ("llama", {"context": 64, "rope": "dynamic", "rotary_dim": 2}, "'dynamic' has one frequency alone"),
        ("gpt2", {"context": 64}, "model.context=64 stretches rope, and the model has none"),
    ],
)
def test_what_cannot_be_stretched_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        decoder(kind, **options)


def test_an_encoder_with_a_position_table_is_refused():
    with pytest.raises(UserError, match=r"model\.context=64 stretches rope, and the model has none"):
        encoder(context=64)
