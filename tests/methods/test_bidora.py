"""BiDoRA: who moves when, by whose batches, and the regularizer in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods
from lowrank.core.errors import UserError
from lowrank.methods.bidora import MAGNITUDE, bilevel
from lowrank.training import build
from lowrank.training import optimizer as optim
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.regularized import penalty_of
from tests.support.tiny_parameters import Q, base
from tests.support.tiny_runs import config_of


def test_magnitudes_follow_the_hypergradient_and_each_group_has_adam_of_its_own():
    """Losses are `m^T C_t v + g_t . (v, m)`, so that the second derivative is C_t and the difference is exact."""
    steps, until, lr = 9, 5, 0.1
    schedule = optax.linear_schedule(lr, 0.0, steps)
    plain = optax.chain(optax.scale_by_adam(), optim.scale_by_given_rate())
    optimizer, rng = bilevel(plain, MAGNITUDE, until, steps), np.random.default_rng(0)
    leaves = {"a": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32), "magnitude": jnp.ones(4)}
    state, moments, held = optimizer.init({"kernel": leaves}), dict.fromkeys(leaves, (0.0, 0.0, 0)), None
    initial = np.asarray(leaves["a"], np.float64)

    @jax.jit
    def step(leaves, state, g, c, lr):
        def gradient_at(trained):
            v, m = trained["kernel"]["a"].reshape(-1), trained["kernel"]["magnitude"]
            return {"kernel": {"a": g["a"] + (m @ c).reshape(2, 3), "magnitude": g["magnitude"] + c @ v}}

        trained = {"kernel": leaves}
        return optimizer.update(gradient_at(trained), state, trained, lr=lr, gradient_at=gradient_at)

    for t in range(steps):
        g = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in leaves.items()}
        c = rng.standard_normal((4, 6)).astype(np.float32)
        v, m = (np.asarray(leaves[name], np.float64).reshape(-1) for name in ("a", "magnitude"))
        gradient = {"a": g["a"] + (m @ c).reshape(2, 3), "magnitude": g["magnitude"] + c @ v}
        updates, state = step(leaves, state, g, c, schedule(t))
        moving = {}
        if t % 2 == 1 and t < until:
            held = gradient
        else:
            moving["a"] = gradient["a"]
        if t in (2, 4):
            moving["magnitude"] = held["magnitude"] - float(schedule(t)) * c @ held["a"].reshape(-1)
        for name in leaves:
            expected = np.zeros(leaves[name].shape)
            if name in moving:
                first, second, n = moments[name]
                first, second = 0.9 * first + 0.1 * moving[name], 0.999 * second + 0.001 * moving[name] ** 2
                moments[name] = first, second, n + 1
                ratio = first / (1 - 0.9 ** (n + 1)) / (np.sqrt(second / (1 - 0.999 ** (n + 1))) + 1e-8)
                expected = -float(schedule(t)) * ratio
            if (name, t) == ("a", until - 1):
                expected, moments["a"] = initial - np.asarray(leaves["a"], np.float64), (0.0, 0.0, 0)
            assert_close(updates["kernel"][name], expected, relative=1e-4)
        leaves = {name: x + updates["kernel"][name] for name, x in leaves.items()}
    assert abs(np.asarray(leaves["a"]) - initial).max() < (steps - until) * lr  # the last steps started from there


def test_the_validation_gradient_has_no_regularizer():
    hooks = methods.build_method({"name": "bidora", "retrain": 0.3}).hooks
    scales = [float(hooks.regularizer_scale(jnp.int32(t), 10)) for t in range(10)]
    assert hooks.holdout.batches(10) == 7
    assert scales == [1, 0, 1, 0, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("steps", "retrain", "batches"), [(9, 0.0, 9), (10, 0.0, 10), (10, 0.4, 5), (2, 0.9, 1)])
def test_a_batch_of_other_records_follows_each_held_out_one(steps, retrain, batches):
    assert methods.build_method({"name": "bidora", "retrain": retrain}).hooks.holdout.batches(steps) == batches


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 6, 8), (2, 3, 6, 5)])
def test_the_regularizer_is_the_mean_distance_of_directions_from_orthogonal(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    group = {"name": "bidora", "rank": 2, "alpha": 4.0, "orthogonal": 0.3, "target": Q}
    params, _ = adapted({"layers": {"attn": {"q": {"kernel": kernel}}}}, group)
    w = params["layers"]["attn"]["q"]["kernel"]
    distances = []
    kernels = (np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]) for x in (w.base, w.a, w.b))
    for base_, a, b in zip(*kernels, strict=True):
        v = base_ + 4 / 2 * a @ b
        d = v / np.linalg.norm(v, axis=0)
        distances.append(np.linalg.norm(d.T @ d - np.eye(shape[-1])))
    assert_close(penalty_of(methods.build_method(group), params), 0.3 * np.mean(distances))


def test_the_plan_holds_records_out_and_evaluation_does_not(tmp_path):
    tiny.llama(tmp_path / "llama")
    tiny.records(tmp_path / "records.jsonl")
    run = build.build_run(config_of(tmp_path, "method=bidora,rank=2,holdout=0.25", eval__split="train"))
    data = run.loader.get_state()["data"]
    assert (data["holdout"], data["holdout_batches"]) == (0.25, run.method.hooks.holdout.batches(run.config.steps))
    assert "holdout" not in run.scorer._held_out[""]._loader.get_state()["data"]
    with pytest.raises(UserError, match=r"data.holdout=0.001 cuts 40 records into 40 and 0"):
        build.build_run(config_of(tmp_path, "method=bidora,rank=2,holdout=0.001"))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"holdout": 0.0}, r"method\.holdout must be positive, not 0\.0"),
        ({"retrain": 1.0}, r"method\.retrain must be in \[0, 1\)"),
        ({"orthogonal": -1.0}, r"method\.orthogonal must be positive"),
        ({"rnak": 1}, r"did you mean 'method\.rank'"),
    ],
)
def test_bad_settings_are_refused(group, message):
    with pytest.raises(UserError, match=message):
        methods.attach(methods.build_method({"name": "bidora", **group}), base(), jax.random.key(0))
