"""Every rule against worked numbers, which were computed with mergekit 0.1.5, PEFT or float64 NumPy."""

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.merging import sparsify
from lowrank.merging.blocks import gram
from lowrank.merging.rule import REQUIRED, Group
from lowrank.merging.rules import RULES, greedy_soup, karcher, mats, regmean, sce
from tests.support.close import assert_close

W0 = np.array([[0.5, -1, 2], [0, 1.5, -0.5]])
DELTAS = {
    "a": np.array([[0.4, -0.2, 0], [0.1, -0.6, 0.3]]),
    "b": np.array([[-0.3, 0.5, 0.2], [0.05, -0.1, -0.9]]),
    "c": np.array([[0.1, 0.1, -0.7], [-0.15, -0.2, 0.25]]),
}


def options(name, preset="mergekit", **given):
    """`(shared, own)`: the options of three models, or of as many as a list in `given` has."""
    rule, count = RULES[name], max([len(v) for v in given.values() if isinstance(v, list)], default=3)
    values = {key: given.get(key, rule.default(key, preset)) for key in rule.options}
    assert REQUIRED not in [v for v in values.values() if not isinstance(v, list)], values
    spread = {
        key: v if isinstance(v, list) else [v] * count for key, v in values.items() if rule.options[key].per_model
    }
    shared = {key: v for key, v in values.items() if not rule.options[key].per_model}
    return shared, [{key: v[i] for key, v in spread.items()} for i in range(count)]


def merge(name, models="abc", preset="mergekit", dtype=np.float64, based=True, **given):
    """The merged tensor of one-tensor models, whose base is W0; it is not given to the rule unless `based`."""
    shared, own = options(name, preset, **given)
    if RULES[name].check:
        RULES[name].check(shared, own)

    def group():
        tensors = [(W0 + DELTAS[m]).astype(dtype) for m in models]
        return Group("w", W0.astype(dtype) if based else None, tensors, shared, own)

    one = group()
    if RULES[name].surveys(shared):
        one.survey = RULES[name].survey(lambda: iter([group()]), shared, own)
    return RULES[name].merge(one)


TIES = [[0.9, -0.5, 1.3], [0, 1.1, -1.4]]
WEIGHTS = [1.0, 0.3, 0.25]
CASES = {
    "linear": ("linear", {"weight": [0.5, 0.3, 0.4]}, [[0.625, -0.925, 1.816667], [0.004167, 1.158333, -0.516667]]),
    "uniform soup": ("uniform_soup", {}, W0 + sum(DELTAS.values()) / 3),
    "task arithmetic": (
        "task_arithmetic",
        {"weight": [1.0, 0.5, -0.25], "lambda": 0.8},
        [[0.68, -0.98, 2.22], [0.13, 1.02, -0.67]],
    ),
    "negation": ("task_arithmetic", {"weight": [-1.0], "models": "a"}, W0 - DELTAS["a"]),
    "slerp": (
        "slerp",
        {"t": 0.3, "models": "ab"},
        [[0.711520, -1.022361, 2.135418], [0.087828, 1.090383, -0.586090]],
    ),
    "slerp in turn": (
        "sequential_slerp",
        {},
        [[0.590385, -0.903158, 1.917924], [0.001838, 1.249866, -0.647414]],
    ),
    "slerp in another order": (
        "sequential_slerp",
        {"models": "bca"},
        [[0.588771, -0.902040, 1.912942], [-0.000888, 1.255739, -0.647640]],
    ),
    "nuslerp": (
        "nuslerp",
        {"models": "ab", "weight": [0.7, 0.3], "based": False},
        [[0.71152015, -1.02236130, 2.13541820], [0.08782777, 1.09038300, -0.58609029]],
    ),
    "nuslerp of task vectors": (
        "nuslerp",
        {"models": "ab", "weight": [3.0, 1.0]},
        [[0.78631439, -0.94630893, 2.11248472], [0.14188155, 0.76119543, -0.66490015]],
    ),
    "nuslerp of rows": (
        "nuslerp",
        {"models": "ab", "weight": [0.7, 0.3], "based": False, "nuslerp_flatten": False},
        [[0.70101044, -1.00655196, 2.09854752], [0.08777304, 1.08960004, -0.58558347]],
    ),
    "nuslerp of columns": (
        "nuslerp",
        {"models": "ab", "weight": [0.7, 0.3], "based": False, "nuslerp_flatten": False, "nuslerp_row_wise": True},
        [[0.69113229, -1.02324219, 2.10887581], [0.08514866, 1.09148447, -0.57689305]],
    ),
    "multislerp": (
        "multislerp",
        {"weight": [0.5, 0.3, 0.4], "based": False},
        [[0.67008736, -0.98685932, 1.86600711], [-0.00922457, 1.22750318, -0.49901276]],
    ),
    "nearswap": ("nearswap", {"models": "a", "t": 0.2}, [[0.7, -1.2, 2], [0.1, 1.3, -0.3]]),
    "sce": ("sce", {}, [[0.75289575, -0.63823129, 1.3], [0.06771812, 1.24244244, -1.4]]),
    "sce of half the entries": ("sce", {"select_topk": 0.5}, [[0.69230769, -1, 1.3], [0, 1.5, -1.4]]),
    "ties": ("ties", {"density": 0.5, "weight": 1.0}, TIES),
    "ties by frequency": (
        "ties",
        {"density": 0.5, "weight": 1.0, "election": "frequency"},
        [TIES[0], [0, 1.1, -0.225]],
    ),
    "ties of the paper": ("ties", {"density": 0.5, "preset": "paper"}, [TIES[0], [-0.15, 1.1, -1.4]]),
    "weighted ties": ("ties", {"density": 0.5, "weight": WEIGHTS}, [[0.9, -0.5, 1.3], [0, 0.98, -0.21]]),
    "ties as a sum": (
        "ties",
        {"density": 0.5, "weight": WEIGHTS, "divisor": "none"},
        [[0.9, -0.85, 1.825], [0, 0.85, -0.1375]],
    ),
    "ties of peft": (
        "ties",
        {"density": 0.5, "weight": WEIGHTS, "preset": "peft"},
        [[0.9, -0.85, 1.825], [0, 1.175, -0.77]],
    ),
    "ties of peft by frequency": (
        "ties",
        {"density": 0.5, "weight": WEIGHTS, "preset": "peft", "election": "frequency"},
        [[0.9, -0.85, 1.825], [0, 1.175, -0.31875]],
    ),
    "breadcrumbs": (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.2, "weight": 1.0},
        [[0.6, -0.7, 2.2], [-0.15, 1.3, 0.05]],
    ),
    "breadcrumbs without outliers": (
        "breadcrumbs",
        {"density": 0.5, "weight": 1.0},
        [[0.6, -0.5, 1.3], [0, 0.7, -0.85]],
    ),
    "model stock": (
        "model_stock",
        {},
        [[0.442333, -1.115335, 2.144169], [0, 1.759503, -0.399082]],
    ),
    "passthrough": ("passthrough", {"models": "a", "scale": [2.0]}, 2 * (W0 + DELTAS["a"])),
    "dense dare": ("dare_linear", {"weight": 1.0}, W0 + sum(DELTAS.values())),
    "dense della": ("della", {"density": 1.0, "weight": 1.0}, [[0.75, -0.7, 1.3], [0.075, 1.2, -1.4]]),
}


@pytest.mark.parametrize("case", CASES)
def test_worked_numbers(case):
    name, given, expected = CASES[case]
    assert_close(merge(name, **given), np.array(expected), relative=2e-6, size=1)


def test_every_rule_has_a_worked_number():
    tested = {name for name, _, _ in CASES.values()}
    apart = {"greedy_soup", "karcher", "fisher", "regmean", "mats"}  # below
    variants = {"dare_ties", "della_linear", "breadcrumbs_ties"}  # of a drop and a sum that have their own
    assert tested | apart | variants == set(RULES)


@pytest.mark.parametrize("name", ["dare_ties", "della_linear", "breadcrumbs_ties"])
def test_variants_at_full_density_are_their_sums(name):
    sums = {"dare_ties": "ties", "breadcrumbs_ties": "ties", "della_linear": "task_arithmetic"}
    expected = merge(sums[name], weight=1.0, divisor="none")
    assert_close(merge(name, weight=1.0, divisor="none"), expected, relative=1e-12)


def test_dare_restores_the_sum_or_the_expectation():
    draws = {rescale: DELTAS["a"].copy() for rescale in ("inverse", "l1")}
    mask = np.array([[1, 0, 1], [1, 1, 0]], bool)

    class Mask:
        def random(self, size):
            return np.where(mask.reshape(-1), 0.0, 1.0)

    for rescale, x in draws.items():
        sparsify.drop(x, 0.6, rescale, Mask())
    assert_close(draws["inverse"], np.array([[0.666667, 0, 0], [0.166667, -1, 0]]), relative=2e-6)
    assert_close(draws["l1"], np.array([[0.581818, 0, 0], [0.145455, -0.872727, 0]]), relative=2e-6)
    sizes = []
    for seed in range(200):
        x = np.ones(500)
        sparsify.drop(x, 0.3, "inverse", np.random.default_rng(seed))
        sizes.append(x.mean())
    assert 0.98 < np.mean(sizes) < 1.02


def test_the_draw_depends_on_no_other_tensor():
    first, again, other, model = (
        sparsify.generator(*key).random(4) for key in [(0, 1, "w"), (0, 1, "w"), (0, 1, "v"), (0, 2, "w")]
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, model)


def test_the_probabilities_of_della():
    p = sparsify.keep_probabilities(DELTAS["b"], 0.6, 0.1)
    assert_close(p, np.array([[0.6, 0.7, 0.5], [0.5, 0.6, 0.7]]), relative=1e-12)
    assert sparsify.keep_probabilities(np.ones((2, 1)), 0.6, 0.1).tolist() == [[0.6], [0.6]]
    x = np.ones((400, 50))
    sparsify.drop_by_rank(x, 0.6, 0.2, "inverse", np.random.default_rng(0))
    assert 0.98 < x.mean() < 1.02


def test_the_karcher_mean_is_free_of_order_and_of_two_is_slerp():
    tensors = [W0 + d for d in DELTAS.values()]
    means = []
    for order in ([0, 1, 2], [2, 0, 1]):
        some = [tensors[i] for i in order]
        c = karcher.coefficients(gram(some), [1.0] * 3, 100, 1e-12)
        means.append(sum(x * w for x, w in zip(some, c, strict=True)))
    assert_close(means[0], means[1], relative=1e-9)
    unit = [x / np.linalg.norm(x) for x in tensors]
    point = means[0] / np.linalg.norm(means[0])
    pulls = [np.arccos(np.vdot(u, point)) for u in unit]
    gradient = sum(a / np.sin(a) * (u - np.cos(a) * point) for a, u in zip(pulls, unit, strict=True))
    assert_close(gradient, np.zeros_like(gradient), relative=1e-9, size=1)
    two = karcher.coefficients(gram(unit[:2]), [1.0, 1.0], 100, 1e-12)
    cosine = np.vdot(unit[0], unit[1])
    half = np.sin(np.arccos(cosine) / 2) / np.sin(np.arccos(cosine))
    assert_close(two, np.array([half, half]), relative=1e-9)


def test_the_edges_of_slerp_and_model_stock():
    shared, own = {"t": 0.5}, [{}, {}]
    ends = lambda a, b: RULES["slerp"].merge(Group("w", None, [a.copy(), b.copy()], shared, own))  # noqa: E731
    assert_close(ends(0 * W0, W0), np.sqrt(0.5) * W0, relative=1e-9)
    assert_close(ends(-W0, W0), 0 * W0, relative=1e-9, size=1)
    twins = [W0 + DELTAS["a"], W0 - DELTAS["a"]]  # at the pole, c = -1
    group = Group("w", W0.copy(), twins, {"filter_wise": False}, own)
    assert_close(RULES["model_stock"].merge(group), W0, relative=1e-12)


def test_the_edges_of_rules_on_the_sphere_and_of_sce():
    shared = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
    own = [{"weight": 1.0}, {"weight": 3.0}]
    opposite = Group("w", None, [W0.copy(), -W0], shared, own)
    assert_close(RULES["nuslerp"].merge(opposite), -0.5 * W0, relative=1e-9)
    cancel = Group("w", W0.copy(), [2 * W0, 0 * W0], {"normalize_weights": True}, [{"weight": 1.0}] * 2)
    assert_close(RULES["multislerp"].merge(cancel), W0, relative=1e-9)
    assert_close(sce.energies([np.full(4, 1e-4), np.full(4, 3e-4)], 1e-6), np.array([0.5, 0.5]), relative=1e-12)
    assert_close(sce.energies([np.full(4, 1e-4), np.full(4, 3e-4)], 0.0), np.array([0.1, 0.9]), relative=1e-9)
    equal = [np.array([1.0, 0, 2, 0]), np.array([0.0, 1, 2, 0])]  # the first two have one variance, the others none
    sce.select(equal, 0.5)
    np.testing.assert_array_equal(equal, [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_filter_wise_model_stock_is_model_stock_of_each_row():
    whole = merge("model_stock", filter_wise=True)
    for row in range(2):
        tensors = [(W0 + d)[row] for d in DELTAS.values()]
        group = Group("w", W0[row].copy(), tensors, {"filter_wise": False}, [{}] * 3)
        assert_close(whole[row], RULES["model_stock"].merge(group), relative=1e-12)


GRAMS = [np.array([[2.0, 1], [1, 1]]), np.array([[1.0, 0], [0, 3]])]
KERNELS = [np.eye(2), np.array([[2.0, 1], [1, -1]])]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [[1.090909, 0.909091], [0.727273, -0.727273]]),
        (0.9, [[1.116175, 0.840036], [0.723861, -0.689008]]),
    ],
)
def test_regmean(alpha, expected):
    stored = [k.T.copy() for k in KERNELS]  # as torch stores them
    statistics = [{"gram": g} for g in GRAMS]
    group = Group("w", None, stored, {"alpha": alpha}, [{}, {}], statistics=statistics)
    assert_close(RULES["regmean"].merge(group).T, np.array(expected), relative=2e-6)


def test_regmean_of_inputs_in_one_direction_is_the_mean_elsewhere():
    grams = [np.diag([1.0, 0]), np.diag([3.0, 0])]
    expected = np.stack([(KERNELS[0][0] + 3 * KERNELS[1][0]) / 4, (KERNELS[0][1] + KERNELS[1][1]) / 2])
    assert_close(regmean.mean_kernel(KERNELS, grams, 1.0), expected, relative=1e-9)


def test_mats():
    outputs = [np.array([[1, 0.5], [0.5, 1]]), np.array([[2.0, 0], [0, 1]])]
    merged = mats.solve_kernel(KERNELS, GRAMS, outputs, np.mean(KERNELS, axis=0), 100, 1e-12)
    assert_close(merged, np.array([[1.334955, 0.681028], [0.890896, -0.823489]]), relative=2e-6)
    one_sided = mats.solve_kernel(KERNELS, GRAMS, [None, None], np.mean(KERNELS, axis=0), 100, 1e-12)
    assert_close(one_sided, regmean.mean_kernel(KERNELS, GRAMS, 1.0), relative=1e-9)


def test_fisher_weighs_each_entry_and_falls_back_to_the_mean():
    fisher = [{"fisher": np.array([1.0, 0, 0])}, {"fisher": np.array([3.0, 2, 0])}]
    tensors = [np.array([0.0, 1, 1]), np.array([4.0, 5, 4])]
    own = [{"weight": 1.0}, {"weight": 2.0}]
    group = Group("w", None, tensors, {"floor": 1e-8}, own, statistics=fisher)
    assert_close(RULES["fisher"].merge(group), np.array([24 / 7, 5, 3.0]), relative=1e-7)


def test_the_greedy_soup_takes_what_does_not_lower_the_score():
    scores = {(0,): 0.5, (1,): 0.7, (2,): 0.6, (1, 2): 0.65, (1, 0): 0.7}
    assert greedy_soup.select(3, lambda models: scores[models]) == (1, 0)


def test_trimming_counts_exactly_and_takes_the_first_of_equal_ones():
    x = np.array([1.0, -2, 2, 0, 2, -1])
    assert np.flatnonzero(sparsify.largest(x, 2)).tolist() == [1, 2]
    assert sparsify.largest(x, 0).sum() == 0
    assert sparsify.largest(x, 6).all()
    sparsify.trim(x, 0.01)
    assert np.count_nonzero(x) == 1


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("linear", {"weight": [1.0, -1.0, 0.5]}, r"weight=-1.0 is negative, and divisor=weight cancels its sign"),
        ("ties", {"weight": [0.0, 0.0, 0.0]}, "the weights sum to zero"),
        ("della", {"weight": 1.0, "density": 0.9}, r"epsilon=0.15 with density=0.9 leaves probabilities outside"),
        ("multislerp", {"weight": [1.0, -2.0, 1.0]}, "the weights sum to zero"),
        ("karcher", {"weight": [1.0, 1.0, 0.0]}, "a mean on the sphere needs positive weights"),
    ],
)
def test_values_that_do_not_go_together(name, given, message):
    with pytest.raises(UserError, match=message):
        merge(name, **given)
