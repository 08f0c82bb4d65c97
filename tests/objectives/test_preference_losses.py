"""The losses of preferences beside numbers that were computed apart, in float64, and the options that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.objectives.preference_losses import LOSSES, Pairs, log1mexp
from lowrank.objectives.unpaired_losses import kto_loss, kto_reference_point, reward_loss
from tests.support.close import assert_close

DIGITS = 3e-8  # the numbers are cut at eight places
LENGTHS = {"chosen_tokens": 4.0, "rejected_tokens": 5.0}
A = Pairs(-12.0, -15.0, -13.0, -14.5, **LENGTHS)
B = Pairs(-13.5, -18.0, -13.0, -14.5, **LENGTHS)  # the chosen answer fell as well
MEANS = Pairs(-1.5 * 4, -2.5 * 5, **LENGTHS)
NUMBERS = [  # (loss, options, its values at A and B)
    ("dpo", {}, (0.62095704, 0.55435524)),
    ("dpo", {"label_smoothing": 0.1}, (0.63595704, 0.58435524)),
    ("robust", {"label_smoothing": 0.1}, (0.60220704, 0.51685524)),
    ("hinge", {}, (0.85, 0.7)),
    ("ipo", {}, (21.6225, 19.580625)),
    ("ipo", {"per_token": False}, (12.25, 4.0)),
    ("exo", {"label_smoothing": 0.1}, (0.43138845, 0.35838338)),
    ("nca", {}, (1.35082481, 1.31938054)),
    ("bco", {"shift": False}, (1.31285630, 1.25184180)),
    ("apo_zero", {}, (0.96252341, 0.92587981)),
    ("apo_down", {}, (0.98754934, 0.91306008)),
    ("dpo_norm", {}, (0.67580029, 0.66481040)),
    ("dpop", {"penalty": 5.0}, (0.62095704, 0.66845964)),
]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def arrays(pairs):
    return Pairs(*(jnp.asarray(x, jnp.float64) for x in pairs))


@pytest.mark.parametrize(("name", "options", "values"), NUMBERS, ids=lambda x: str(x))
def test_a_loss_with_a_reference_has_the_numbers(name, options, values):
    loss = LOSSES[name](beta=0.1, **options).loss
    for pairs, value in zip((A, B), values, strict=True):
        assert_close(loss(arrays(pairs)), value, relative=DIGITS)


def test_losses_without_a_reference_have_the_numbers():
    means = arrays(MEANS)
    assert_close(LOSSES["simpo"](beta=2.0, gamma_ratio=0.5).loss(means), 0.31326168, relative=DIGITS)
    assert_close(LOSSES["orpo"](beta=0.1).loss(means), 1.52710584, relative=DIGITS)
    first = LOSSES["cpo"](beta=0.1, alpha=0.0).loss(arrays(A))
    assert_close(first, 0.55435524, relative=DIGITS)
    assert_close(LOSSES["cpo"](beta=0.1, alpha=1.0).loss(arrays(A)), first + 12 / 4)


@pytest.mark.parametrize(
    ("smoothing", "slopes"), [(0.0, (-0.04625701, -0.04255574)), (0.1, (-0.03625701, -0.03255574))]
)
def test_the_slope_of_dpo_is_opposite_in_the_two_answers(smoothing, slopes):
    loss = LOSSES["dpo"](beta=0.1, label_smoothing=smoothing).loss
    for pairs, slope in zip((A, B), slopes, strict=True):
        gradient = jax.grad(lambda p: loss(p))(arrays(pairs))
        assert_close(gradient.chosen, slope, relative=4e-7)
        assert_close(gradient.rejected, -slope, relative=4e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_where_policy_and_reference_agree_rewards_are_0_and_the_chosen_answer_is_pulled_up(name):
    value = LOSSES[name]()
    pairs = arrays(A)
    if value.reference:
        pairs = pairs._replace(chosen_reference=pairs.chosen, rejected_reference=pairs.rejected)
        assert not np.any(value.rewards(pairs))
    gradient = jax.grad(lambda p: value.loss(p))(pairs)
    assert gradient.chosen < 0 or name == "apo_down"  # which only pushes the rejected answer down at the start
    assert gradient.rejected > 0
    if name in ("dpo", "dpo_norm", "dpop", "robust"):
        assert_close(value.loss(pairs), np.log(2))


def test_the_shift_of_bco_is_taken_off_both_rewards():
    loss = LOSSES["bco"]().loss
    moved = A._replace(chosen_reference=A.chosen_reference - 2.0, rejected_reference=A.rejected_reference - 2.0)
    assert_close(loss(arrays(moved._replace(shift=0.2))), loss(arrays(A)))


def test_rewards_are_beta_times_log_ratios_of_sums_or_of_means():
    assert_close(LOSSES["dpo"](beta=0.1).rewards(arrays(A)), (0.1, -0.05))
    assert_close(LOSSES["dpo_norm"](beta=0.1).rewards(arrays(A)), (0.1, -0.05))
    assert_close(LOSSES["simpo"](beta=2.0).rewards(arrays(MEANS)), (-3.0, -5.0))


def test_the_log_of_one_minus_a_probability_is_exact_and_finite():
    x = np.array([-1e-6, -0.1, -0.69, -0.7, -3.0])
    assert_close(log1mexp(x), np.log(-np.expm1(x)), relative=1e-12, per_element=True)
    assert_close(log1mexp(-40.0), -np.exp(-40.0))
    assert np.isfinite(log1mexp(jnp.zeros(1))).all()
    assert np.isfinite(jax.grad(lambda x: log1mexp(x))(0.0))


def test_kto_has_the_numbers():
    ratios, desirable = jnp.array([1.0, -0.5, 2.0, -3.0]), jnp.array([True, True, False, False])
    z = kto_reference_point(jnp.array([0.4, -0.2, 0.6, 0.0]), jnp.ones(4))
    assert_close(z, 0.2)
    losses = kto_loss(ratios, desirable, z, beta=0.1)
    assert_close(losses, [0.48001065, 0.51749285, 0.54487889, 0.42067574], relative=DIGITS)
    assert_close(jnp.mean(losses), 0.49076453, relative=DIGITS)
    weighted = kto_loss(ratios, desirable, z, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert_close(weighted, losses * jnp.array([2.0, 2.0, 3.0, 3.0]))


def test_the_point_of_kto_is_never_negative_counts_no_filler_and_has_no_gradient():
    assert kto_reference_point(jnp.array([-1.0, 0.5]), jnp.ones(2)) == 0
    assert_close(kto_reference_point(jnp.array([9.0, 0.5]), jnp.array([0.0, 1.0])), 0.5)
    assert not jax.grad(lambda x: kto_reference_point(x, jnp.ones(2)))(jnp.ones(2)).any()


def test_the_reward_model_has_the_numbers():
    assert_close(reward_loss(1.2, 0.4), 0.37110066, relative=DIGITS)
    assert_close(reward_loss(1.2, 0.4, margin=0.5), 0.55435524, relative=DIGITS)
    assert_close(reward_loss(1.2, 0.4, centering=0.01), 0.39670066, relative=DIGITS)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        *((name, {"beta": 0.0}, "objective.beta=0.0 must be above 0") for name in LOSSES),
        ("dpo", {"beta": -1.0}, "objective.beta=-1.0 must be above 0"),
        ("dpo", {"beta": float("nan")}, "must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ("exo", {"label_smoothing": 0.0}, "makes the loss of exo infinite"),
        ("dpop", {"penalty": -1.0}, "objective.penalty=-1.0 must be 0 or more"),
        ("cpo", {"alpha": -1.0}, "objective.alpha=-1.0 must be 0 or more"),
        ("simpo", {"gamma_ratio": -0.1}, "objective.gamma_ratio=-0.1 must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, text):
    with pytest.raises(UserError, match=text):
        LOSSES[name](**options)
