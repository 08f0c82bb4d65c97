"""LongLoRA's interpolated positions: rope's linear scaling, on longer rows, in the adapter that comes back."""

import dataclasses

import jax
import numpy as np
import pytest

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core.errors import UserError
from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.models.rope import RopeScaling, rope_frequencies
from tests.support.adapted_model import adapted
from tests.support.checkpoint_files import LLAMA, directory
from tests.support.close import assert_close
from tests.support.tiny_models import GPT2, SIZES, decoder, run, tokens


def test_positions_are_divided_by_the_factor_in_float64():
    model, params = decoder("llama", position_factor=4.0)
    linear, _ = decoder("llama", rope_scaling=RopeScaling("linear", 4.0))
    ids = tokens(2, 20)
    assert_close(run(model, params, ids), run(linear, params, ids))
    head, theta = model.config.head_dim, model.config.rope_theta
    expected = [theta ** (-2 * i / head) / 4 for i in range(head // 2)]
    assert_close(rope_frequencies(head, theta, RopeScaling("linear", 4.0)), expected)


def test_so_many_times_as_many_positions_fit():
    model, params = decoder("llama", position_factor=1.5)
    assert run(model, params, tokens(1, 48)).shape[1] == 48
    with pytest.raises(UserError, match="a sequence of 49 tokens is longer than the model's 48 positions"):
        run(model, params, tokens(1, 49))


LONGLORA = {"name": "longlora", "rank": 2, "group": 4}


@pytest.mark.parametrize(
    ("group", "options"),
    [({**LONGLORA, "factor": 2.0}, {}), (LONGLORA, {"context": 128, "rope": "ntk"})],
    ids=["factor", "context"],
)
def test_the_adapter_brings_the_context(tmp_path, group, options):
    folder = str(directory(tmp_path / "llama", {**LLAMA, "tie_word_embeddings": False}))
    method = methods.build_method(group)
    base = pretrained.load(folder, model={**options, **method.model_options})
    params, _ = adapted(base.params, group)
    mask = methods.trainable_mask(method, params)
    assert adapter_files.save(params, base, tmp_path / "out", mask=mask, method=group) == "trained leaves by name"
    again = load.load_adapted(tmp_path / "out", folder)
    assert again.config == dataclasses.replace(base.config, shift_group=0)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DecoderConfig, {**GPT2, "position_factor": 2.0}, "position_factor=2.0 stretches rope, and the model has none"),
        (
            EncoderConfig,
            {"layers": 1, "position_factor": 2.0},
            "position_factor=2.0 stretches rope, and the model has none",
        ),
        (DecoderConfig, {**GPT2, "position_factor": 0.5}, "position_factor=0.5 is below 1"),
    ],
)
def test_a_model_without_rope_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**{**SIZES, **options})
