"""The comparison of bases: bits are counted, bases are scored untuned, and the table holds both kinds of rows."""

import csv

import jax.numpy as jnp
import numpy as np

from experiments.quantization import bases, table
from experiments.quantization.rows import BASES, ROWS
from experiments.study import run
from experiments.study.study import Study
from experiments.study.tasks import TASKS
from lowrank.weights.quantized import codebook
from tests.support import study_tasks as studies
from tests.support.close import assert_close


def test_bits_are_those_of_codes_and_scales():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 64)), jnp.float32)
    plain = bases.bits({"layers": {"attn": {"q": {"kernel": kernel}}}})
    assert plain["bits_in_memory"] == 32
    assert 32 < plain["bits_on_disk"] < 33
    nf4 = codebook.quantize(kernel, table="nf4", block=64, double=False)
    assert_close(bases.bits({"layers": {"attn": {"q": {"kernel": nf4}}}})["bits_in_memory"], 4.5)


def test_the_nearest_centroid_is_the_class(monkeypatch):
    points = {"train": ([[1, 0], [0.8, 0.6], [0, 1]], [2, 2, 5]), "test": ([[0.9, 0.1], [0.1, 0.9], [1, 0]], [2, 5, 5])}
    found = {split: (np.array(x, float), np.array(y)) for split, (x, y) in points.items()}
    monkeypatch.setattr(bases, "embed_articles", lambda model, template, split: found[split])
    assert_close(bases.by_centroid(None), 2 / 3)


def test_the_study_has_a_row_for_each_base_untuned_and_tuned(tmp_path, monkeypatch):
    studies.shrink(tmp_path, monkeypatch)
    monkeypatch.setattr(table, "BASES", {"nf4": BASES["nf4"]})
    monkeypatch.delitem(TASKS, "topics")
    study = Study("quantization", {"nf4+lora": ROWS["nf4+lora"]}, tmp_path / "results", tmp_path / "runs", quick=True)
    run.run(study, table.write, ["headlines"], ["nf4+lora"])
    found = list(csv.DictReader((study.results / "table.csv").read_text().splitlines()))
    assert tuple(found[0]) == table.COLUMNS
    assert [(row["base"], row["method"]) for row in found] == [("nf4", "none"), ("nf4", "lora")]
    assert all(float(row["score_mean"]) > 1 for row in found)
    assert (study.results / "bits.png").stat().st_size > 1000
