"""The measures of LoRA's directions, against matrices whose answers are known."""

import numpy as np

from experiments.lora_rank.subspaces import amplification, input_directions, phi
from tests.support.close import assert_close

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
