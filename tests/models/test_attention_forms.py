"""The form of attention that a model's config names, and the form that its layers take."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lowrank.core.errors import UserError
from lowrank.models import DecoderConfig, EncoderConfig, describe_attention
from tests.support.close import assert_close
from tests.support.tiny_models import LLAMA, SIZES, decoder, run, tokens

TPU, CPU = (SimpleNamespace(platform=p, device_kind=kind) for p, kind in (("tpu", "TPU v6 lite"), ("cpu", "cpu")))


@pytest.mark.parametrize("kind", ["gemma", "windowed"])
def test_a_model_with_blockwise_attention_equals_one_with_dense_attention(kind):
    ids, segments = tokens(2), np.array([[0] * 3 + [1] * 5 + [2] * 4, [1] * 12], np.int32)
    results = [run(*decoder(kind, attention=form), ids, segments=segments) for form in ("dense", "blockwise")]
    assert_close(*results, relative=2e-5)


@pytest.mark.parametrize(
    ("options", "device", "length", "form"),
    [
        ({}, TPU, 2048, "splash"),
        ({}, CPU, 2048, "blockwise"),
        ({}, CPU, 512, "dense"),
        ({"window": 128, "local_layers": (True, False), "attn_logit_softcap": 50.0}, TPU, 2048, "splash"),
        ({"prefix_length": 4}, TPU, 2048, "blockwise"),
        ({"num_prompt": 4}, TPU, 2048, "blockwise"),
        ({"shift_group": 256}, TPU, 2048, "dense"),
    ],
)
def test_the_log_names_the_form_of_the_layers(options, device, length, form):
    config = DecoderConfig(**{**SIZES, **LLAMA, **options})
    line = f"attention on {device.device_kind}: {form} in 2 layers, for rows of {length} tokens"
    assert describe_attention(config, device, 4, length) == line


def test_a_bidirectional_model_takes_splash_too():
    assert "splash in 2 layers" in describe_attention(EncoderConfig(**SIZES, layers=2), TPU, 4, 1024)


def test_a_form_that_cannot_run_is_refused_before_a_run_starts():
    with pytest.raises(UserError, match=r"unknown form in model.attention 'flash'.*known: auto, blockwise, cudnn"):
        DecoderConfig(**{**SIZES, **LLAMA, "attention": "flash"})
    with pytest.raises(UserError, match="attention=splash cannot run: it is only for tpu, not for cpu"):
        describe_attention(DecoderConfig(**{**SIZES, **LLAMA, "attention": "splash"}), CPU, 4, 2048)


def test_tokens_that_do_not_divide_over_context_are_refused():
    config = DecoderConfig(**{**SIZES, **LLAMA, "num_prompt": 4})
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 4), ("data", "context"))):
        assert "dense" in describe_attention(config, CPU, 4, 28)
        with pytest.raises(
            UserError, match=r"32 tokens and 4 virtual tokens .* into 8 chunks.* set data.seq_len to 36"
        ):
            describe_attention(config, CPU, 4, 32)
