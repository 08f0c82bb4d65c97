"""Pruning by scores and by SparseGPT: the worked kernel of the authors' codes, exact numbers, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.compression import masks, schedule, scores, sparsegpt
from lowrank.core.errors import UserError
from tests.support.close import assert_close
from tests.support.worked_kernel import GRAM, X

KERNEL = np.array([[0.9, -0.2, 0.1, 1.2], [-0.4, 0.8, -0.3, -1.1], [0.05, 0.6, 0.7, 0.95], [0.3, -0.1, -0.5, 1.0]])


def error(kernel):
    """The squared error of the outputs."""
    return float(np.sum(np.square(X @ (KERNEL - kernel))))


@pytest.mark.parametrize(
    ("score", "choose", "rows", "lost"),
    [
        ("magnitude", lambda s: masks.by_kernel(s, 0.5), "1001 0101 0111 0001", 6.045),
        ("magnitude", lambda s: masks.n_of_m(s, 2, 4), "1001 1101 0110 0010", 15.76),
        ("wanda", lambda s: masks.n_of_m(s, 2, 4), "1001 1100 0110 0011", 13.94),
        ("wanda", lambda s: masks.by_output(s, 0.5), "1001 1100 0110 0011", 13.94),
    ],
)
def test_the_worked_kernel_keeps_what_the_authors_keep(score, choose, rows, lost):
    mask = choose(scores.SCORES[score](KERNEL, GRAM))
    assert " ".join("".join(str(int(x)) for x in row) for row in mask) == rows
    assert_close(error(KERNEL * mask), lost)


HALF = [[0.9, 0, 0, 1.2], [0, 0.802336, 0, -1.1], [0, 0, 0.673952, 0.95], [0, 0, -0.529153, 1]]
TWO_OF_FOUR = [
    [0.9, 0, 0, 0],
    [0, 0.802336, 0, -1.114017],
    [0, 0.512558, 0.673952, 0],
    [0.225481, 0, -0.529153, 1.143079],
]
WORKED = {
    "half": ({"block": 4}, HALF, 4.652635),
    "half in blocks of two": ({"block": 2}, HALF, 4.652635),
    "2 of 4": ({"pattern": (2, 4)}, TWO_OF_FOUR, 20.566249),
}


@pytest.mark.parametrize("case", WORKED)
def test_sparsegpt_of_the_worked_kernel_is_the_authors(case):
    options, expected, lost = WORKED[case]
    values, mask = sparsegpt.prune_sparsegpt(KERNEL, GRAM, **options)
    assert_close(values, expected)
    assert_close(error(values), lost)
    np.testing.assert_array_equal(mask, np.array(expected) != 0)


def test_the_less_is_lost_the_more_of_the_inputs_a_pruner_reads():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(256, 32)) @ rng.normal(size=(32, 32)) * np.exp(rng.normal(size=32))  # of unlike sizes
        kernel, gram = rng.normal(size=(32, 24)), x.T @ x
        pruned = [kernel * masks.by_output(scores.SCORES[name](kernel, gram), 0.5) for name in ("magnitude", "wanda")]
        pruned.append(sparsegpt.prune_sparsegpt(kernel, gram)[0])
        magnitude, wanda, gpt = (np.sum(np.square(x @ (kernel - other))) for other in pruned)
        assert gpt < wanda < magnitude


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("block", [8, 128])
def test_exactly_the_asked_number_is_pruned_whatever_the_block(sparsity, block):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(64, 20)), rng.normal(size=(20, 10))
    x[:, 3] = 0
    values, mask = sparsegpt.prune_sparsegpt(kernel, x.T @ x, sparsity=sparsity, block=block)
    assert (~mask).sum() == round(100 * sparsity) * 2
    assert not values[~mask].any()
    if sparsity > 0.1:
        assert not mask[3].any()  # the input that was always 0
    assert (~masks.by_output(np.abs(kernel), sparsity)).sum(0).tolist() == [int(20 * sparsity)] * 10
    assert (~masks.by_kernel(np.zeros((20, 10)), sparsity)).sum() == (~mask).sum()  # ties too


def test_of_equal_scores_the_first_is_kept():
    np.testing.assert_array_equal(masks.by_output(np.ones((4, 1)), 0.5)[:, 0], [True, True, False, False])


def test_scores_of_all_kernels_compete():
    found = masks.by_model({"small": np.full((2, 2), 0.1), "large": np.full((2, 2), 1.0)}, 0.5)
    assert not found["small"].any()
    assert found["large"].all()


def test_scores_of_gradients_are_those_of_the_worked_numbers():
    w, g = np.array([1, -2, 0.5, 3]), np.array([[0.1, 0.2, -1, 0.05], [0.3, -0.2, 0.6, -0.01]])
    assert_close(np.mean([scores.first_order(w, one) for one in g], axis=0), [0.2, 0.4, 0.4, 0.09])
    assert_close(scores.first_order(w, g.mean(0)), [0.2, 0, 0.1, 0.06])
    assert_close(scores.second_order(w, np.square(g).mean(0)), [0.025, 0.08, 0.085, 0.00585])
    assert_close(scores.movement(np.array([2.0, -1.0])), [-2.0, 1.0])


def test_the_schedule_is_cubic_and_layers_with_outliers_are_pruned_less():
    at = [schedule.cubic_sparsity(step, begin=10, end=20, final=0.8) for step in (0, 10, 15, 20, 30)]
    assert_close(at, [0, 0, 0.7, 0.8, 0.8])
    shares = {"a": 0.0, "b": 0.1, "c": 0.2}
    assert_close(list(schedule.layer_sparsities(shares, 0.5).values()), [0.58, 0.5, 0.42])
    assert schedule.layer_sparsities(dict.fromkeys(shares, 0.1), 0.5) == dict.fromkeys(shares, 0.5)
    assert_close(schedule.outlier_share(np.array([1.0, 1, 1, 17]), 3), 0.25)


BAD = {
    "share": (lambda: masks.by_kernel(np.ones((2, 2)), 1.5), r"sparsity=1.5 is not in \[0, 1\]"),
    "kept": (lambda: masks.n_of_m(np.ones((8, 2)), 5, 4), "5:4 keeps 5 of 4 entries"),
    "group": (
        lambda: sparsegpt.prune_sparsegpt(np.ones((6, 2)), np.eye(6), pattern=(2, 4)),
        "2:4 needs kernels whose inputs are divisible by 4, and one has 6",
    ),
    "within": (lambda: masks.within("outputs"), r"unknown within 'outputs' .did you mean 'output'"),
    "schedule": (lambda: schedule.cubic_sparsity(0, begin=5, end=5, final=0.5), "end=5 is not after begin=5"),
    "spread": (lambda: schedule.layer_sparsities({"a": 0, "b": 1}, 0.95), "spread=0.08 gives layers a sparsity"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_met_is_refused(case):
    call, text = BAD[case]
    with pytest.raises(UserError, match=text):
        call()


def test_kernels_in_half_precision_are_pruned_in_float32():
    values, _ = sparsegpt.prune_sparsegpt(np.asarray(jnp.asarray(KERNEL, jnp.bfloat16)), GRAM)
    assert values.dtype == np.float32
