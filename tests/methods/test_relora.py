"""ReLoRA: what a restart does to weights and moments, and that the saved result is the trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods
from lowrank.adapters import load
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import merge
from lowrank.methods.relora import restart_optimizer
from lowrank.training import build, loop
from lowrank.training import optimizer as optim
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference
from tests.support.tiny_parameters import base
from tests.support.tiny_runs import config_of

QV = r".*attn/(q|v)/kernel"
ARG, STEPS = "method=relora,every=3,warmup=2,rank=2,alpha=4.0", 8


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa"])
def test_a_restart_moves_the_update_into_the_base(init):
    group = {"name": "relora", "rank": 2, "target": QV, "init": init}
    params, _ = adapted(base(), group)
    again = methods.build_method(group).hooks.every_n_steps.change
    anew = jax.jit(again)(params, jax.random.key(7))
    before, w = params["layers"]["attn"]["q"]["kernel"], anew["layers"]["attn"]["q"]["kernel"]
    if init == "pissa":
        assert np.any(w.b)
    else:
        expected = np.float64(before.base) + 16 / 2 * np.einsum("lir,lro->lio", *map(np.float64, (before.a, before.b)))
        assert_close(w.base, expected)
        assert not np.any(w.b)
    assert difference(w.a, before.a) > 1e-3
    assert_close(merge(anew), merge(params))


def test_shares_of_the_run_become_steps(files):
    run = build.build_run(config_of(files, "method=relora,rank=2,every=0.25", steps=10))
    assert [step for step in range(10) if run.restarts_at(step)] == [2, 4, 6, 8]


def test_the_moments_are_forgotten_and_the_rate_rises_again():
    every, warmup, lr, steps = 4, 3, 0.1, 11
    optimizer = restart_optimizer(optax.chain(optax.scale_by_adam(), optim.scale_by_given_rate()), every, warmup)
    gradients = np.random.default_rng(0).standard_normal((steps, 5))
    state, step = optimizer.init(jnp.zeros(5)), jax.jit(optimizer.update)
    for t, g in enumerate(gradients):
        n = t % every + 1  # updates since the restart
        if n == 1:
            m = v = np.zeros(5)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = lr * (1 - t / steps) * (min(1, n / warmup) if t >= every else 1)
        expected = -rate * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        update, state = step(jnp.asarray(g, jnp.float32), state, jnp.zeros(5), lr=jnp.float32(lr * (1 - t / steps)))
        assert_close(update, expected, relative=1e-4)


def config(files):
    return config_of(files, ARG, optim__lr=0.05, mesh__data=1, checkpoint__every=0, steps=STEPS)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """`(workdir of a run that nothing interrupted, its last parameters)`."""
    folder, ends = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        finish = loop.Trainer._finish
        patch.setattr(
            loop.Trainer, "_finish", lambda run, *scores: (ends.append(run._params()), finish(run, *scores))[1]
        )
        loop.run(config(files), folder)
    return folder, ends[0]


def test_what_is_saved_is_the_trained_model(files, whole):
    workdir, params = whole
    loaded = load.load_adapted(workdir / "adapter", str(files / "llama")).params
    for (name, x), (_, y) in zip(tree.named_leaves(loaded), tree.named_leaves(params), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    start = build.build_run(config(files)).load().params["layers"]["attn"]["q"]["kernel"]
    assert difference(params["layers"]["attn"]["q"]["kernel"].base, start) > 1e-3


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("method=relora,every=8,rank=2,warmup=1", "method.every 8 is not less than the run's 8 steps"),
        ("method=relora,every=4,rank=2,warmup=5", "method.warmup 5 is longer than method.every 4"),
        ("method=relora,every=0", "method.every must be positive"),
        ("method=relora,rnak=2", "did you mean 'method.rank'"),
    ],
)
def test_bad_settings_are_refused(arg, message, files):
    with pytest.raises(UserError, match=message):
        build.build_run(config_of(files, arg))
