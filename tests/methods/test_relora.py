"""ReLoRA: what a restart does to weights and moments, and that the saved result is the trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods
from lowrank.adapters import load
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import declared_mask, merge
from lowrank.methods.relora import prune_moments
from lowrank.training import build, loop
from lowrank.training import optimizer as optim
from lowrank.training.optimizer import OptimConfig
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference
from tests.support.tiny_parameters import attached, base
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


def test_the_smallest_moments_of_each_factor_are_forgotten_and_no_others():
    every, share, lr, steps = 4, 0.8, 0.1, 10
    params, _ = attached(name="relora", rank=2, target=QV)
    trained, _ = tree.split(params, declared_mask(params, ["head/.*"]))
    optimizer = prune_moments(optim.build_optimizer(OptimConfig(clip=0), steps, trained), every, share)
    rng, state, step = np.random.default_rng(0), optimizer.init(trained), jax.jit(optimizer.update)
    m, v = ({name: np.zeros(x.shape) for name, x in tree.named_leaves(trained)} for _ in range(2))
    for t in range(steps):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), trained)
        if t in (4, 8):  # after a restart, B is 0 and A has no gradient
            gradient = tree.map_named(lambda name, g: jnp.zeros_like(g) if name.endswith("/a") else g, gradient)
        updates, state = step(gradient, state, trained, lr=jnp.float32(lr))
        for name, g in tree.named_leaves(gradient):
            for layers in zip(m[name], v[name], strict=True) if t in (4, 8) and name != "head/kernel" else ():
                small = [np.abs(layer) <= np.quantile(np.abs(layer), share) for layer in layers]
                for layer in layers:
                    layer[np.any(small, axis=0)] = 0
            g = np.float64(g)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            root = np.sqrt(v[name] / (1 - 0.999 ** (t + 1))) + 1e-8
            expected = -lr * m[name] / (1 - 0.9 ** (t + 1)) / root
            assert_close(dict(tree.named_leaves(updates))[name], expected, relative=1e-4, name=f"{t} {name}")


def test_the_rate_that_is_logged_is_the_one_that_acts(files):
    run = build.build_run(config_of(files, "method=relora,rank=2,every=4,warmup=3", optim__lr=0.1, steps=10))
    plain = optim.learning_rates(run.optim, 10)
    assert_close(run.learning_rates, plain * [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3])


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
        ("method=relora,prune=1.5", "method.prune 1.5 is above 1"),
        ("method=relora,rnak=2", "did you mean 'method.rank'"),
    ],
)
def test_bad_settings_are_refused(arg, message, files):
    with pytest.raises(UserError, match=message):
        build.build_run(config_of(files, arg))
