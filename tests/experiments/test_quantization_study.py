"""The comparison of bases: bits are counted, and bases are scored untuned."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.quantization import bases
from lowrank.weights.quantized import codebook
from tests.support.close import assert_close


def test_bits_are_those_of_codes_and_scales():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 64)), jnp.float32)
    plain = bases.bits({"layers": {"attn": {"q": {"kernel": kernel}}}})
    assert plain["bits_per_weight"] == 32
    assert 32 < plain["bits_on_disk"] < 33
    nf4 = codebook.quantize(kernel, table="nf4", block=64, double=False)
    assert_close(bases.bits({"layers": {"attn": {"q": {"kernel": nf4}}}})["bits_per_weight"], 4.5)


def test_the_bits_under_a_method_are_those_of_its_forms(files):
    config = {
        "model": {"name": str(files / "llama"), "quantize": {"name": "int8"}},
        "method": {"name": "lora", "rank": 2},
    }
    assert 8 < bases.bits_under(config) < 10
    qat = {"model": {"name": str(files / "llama")}, "method": {"name": "qat", "quantize": "int4"}}
    assert bases.bits_under(qat) == 32  # QAT trains in float32


def test_the_nearest_centroid_is_the_class(monkeypatch):
    points = {"train": ([[1, 0], [0.8, 0.6], [0, 1]], [2, 2, 5]), "held": ([[0.9, 0.1], [0.1, 0.9], [1, 0]], [2, 5, 5])}
    found = {split: (np.array(x, float), np.array(y)) for split, (x, y) in points.items()}
    monkeypatch.setattr(bases, "embed_articles", lambda model, template, split: found[split])
    model = SimpleNamespace(run=ConfigDict({"data": {"split": "train"}, "eval": {"split": "held"}}))
    assert_close(bases.by_centroid(model), 2 / 3)
