"""The measures of LoRA's directions, against matrices whose answers are known."""

import csv

import numpy as np

from experiments.lora_rank import analysis
from experiments.lora_rank.subspaces import amplification, input_directions, phi
from lowrank.pretrained import load
from lowrank.sweeps.axes import product, seeds
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.study import Study
from lowrank.training import loop
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.standard_normal((24, 24)))[0]
OTHER = np.linalg.qr(RNG.standard_normal((16, 16)))[0]


def test_phi_is_the_share_of_one_subspace_within_another():
    assert_close(phi(BASIS, BASIS, 3, 8), 1.0, relative=1e-12)
    assert abs(phi(BASIS[:, :3], BASIS[:, 3:], 3, 8)) < 1e-24
    mixed = np.stack([BASIS[:, 0], BASIS[:, 20]], axis=1)  # one of two directions lies within
    assert_close(phi(mixed, BASIS, 2, 4), 0.5, relative=1e-12)
    random = [input_directions(RNG.standard_normal((400, 40))) for _ in range(2)]
    assert_close(phi(*random, 20, 40), 40 / 400, relative=0.25)


def test_the_directions_of_a_product_are_ordered_by_the_product():
    scales = np.array([1.0, 5.0, 3.0])
    found = input_directions(BASIS[:, :3] * scales @ OTHER[:3])
    assert_close(np.abs(found[:, :3].T @ BASIS[:, :3]), np.eye(3)[[1, 2, 0]], relative=1e-12)


def test_an_update_amplifies_the_directions_that_the_weight_has_little_of():
    weight = BASIS[:, :4] * [8.0, 4.0, 0.5, 0.25] @ OTHER[:4]
    update = BASIS[:, 2:4] * [6.0, 8.0] @ OTHER[2:4]
    found = amplification(weight, update, 2, np.random.default_rng(1))
    wanted = [np.sqrt(80.3125), 10.0, np.sqrt(0.3125), np.sqrt(80.0)]
    assert_close(np.array(found[:4]), np.array(wanted), relative=1e-12)
    assert_close(found.factor, 10 / np.sqrt(0.3125), relative=1e-12)
    assert found.by_chance < found.by_weight


def test_the_adapters_of_a_study_are_measured_in_the_middle_layer(files, tmp_path):
    base = config_of(files, optim__lr=0.05, mesh__data=1, checkpoint__every=0, steps=3)
    study = open_study(Study("rank", base, product(({"method.rank": 2},), seeds(2))), tmp_path / "study")
    for cell in study.cells:
        loop.run(cell.config, study.run_path(cell.key))
    updates = analysis.read_updates(study)
    assert sorted(updates) == [(2, seed, kernel) for seed in (0, 1) for kernel in "qv"]
    weight = np.asarray(load(str(files / "llama")).params["layers"]["attn"]["q"]["kernel"])
    assert_close(updates[2, 0, "q"].weight, weight[weight.shape[0] // 2], relative=1e-6)
    assert np.linalg.matrix_rank(updates[2, 0, "q"].delta) == 2
    analysis.analyze(None, study, tmp_path)
    found = list(csv.DictReader((tmp_path / "phi.csv").read_text().splitlines()))
    whole = [float(line["phi"]) for line in found if line["pair"] == "r = 2 and r = 2" and line["i"] == line["j"]]
    assert_close(np.array(whole), np.ones(len(whole)), relative=1e-6)  # a matrix and itself
    rows = list(csv.DictReader((tmp_path / "amplification.csv").read_text().splitlines()))
    assert [(row["kernel"], row["rank"], row["seeds"]) for row in rows] == [("q", "2", "2"), ("v", "2", "2")]
    assert analysis.amplification_table(None, tmp_path).count("\n| MiniLM's") == 2
    assert (tmp_path / "phi.png").stat().st_size > 1000
