"""BiDoRA: who moves when, by whose batches, and the regulariser in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods, plan
from lowrank.errors import UserError
from lowrank.methods.bidora import MAGNITUDE, alternating
from tests import tiny
from tests.adapted import adapted
from tests.test_methods import Q, base
from tests.test_train import config_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_each_group_has_adam_of_its_own_and_one_schedule_goes_on():
    steps, until, lr = 9, 6, 0.1
    plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(optax.linear_schedule(lr, 0.0, steps)))
    optimizer = alternating(plain, MAGNITUDE, until)
    rng = np.random.default_rng(0)
    trained = {"kernel": {"a": jnp.zeros((2, 3)), "magnitude": jnp.zeros(4)}}
    state, step = optimizer.init(trained), jax.jit(optimizer.update)
    moments = {name: (np.zeros(x.shape), np.zeros(x.shape), 0) for name, x in trained["kernel"].items()}
    for t in range(steps):
        gradient = {name: rng.standard_normal(x.shape) for name, x in trained["kernel"].items()}
        updates, state = step({"kernel": jax.tree.map(jnp.float32, gradient)}, state, trained)
        moving = "magnitude" if t % 2 == 1 and t < until else "a"
        for name, g in gradient.items():
            expected = np.zeros_like(g)
            if name == moving:
                m, v, n = moments[name]
                m, v, n = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, n + 1
                expected = -lr * (1 - t / steps) * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
            np.testing.assert_allclose(updates["kernel"][name], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 6, 8)])
def test_the_regulariser_is_the_mean_distance_of_directions_from_orthogonal(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    group = {"name": "bidora", "rank": 2, "alpha": 4.0, "orthogonal": 0.3, "target": Q}
    params, _ = adapted({"layers": {"attn": {"q": {"kernel": kernel}}}}, group)
    w = params["layers"]["attn"]["q"]["kernel"]
    distances = []
    for base_, a, b in zip(*(np.asarray(x, np.float64) for x in (w.base, w.a, w.b)), strict=True):
        v = base_ + 4 / 2 * a @ b
        d = v / np.linalg.norm(v, axis=0)
        distances.append(np.linalg.norm(d.T @ d - np.eye(shape[-1])))
    np.testing.assert_allclose(methods.build(group).penalty(params), 0.3 * np.mean(distances), rtol=1e-5)


def test_the_plan_holds_records_out_and_evaluation_does_not(tmp_path):
    tiny.llama(tmp_path / "llama")
    tiny.records(tmp_path / "records.jsonl")
    job = plan.make(config_of(tmp_path, "method=bidora,rank=2,holdout=0.25", eval__split="train"))
    assert job.loader.get_state()["data"]["holdout"] == 0.25
    assert "holdout" not in job.scorer._loader.get_state()["data"]
    with pytest.raises(UserError, match=r"data.holdout=0.001 cuts 40 records into 40 and 0: too few"):
        plan.make(config_of(tmp_path, "method=bidora,rank=2,holdout=0.001"))


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
        methods.attach(methods.build({"name": "bidora", **group}), base(), jax.random.key(0))
