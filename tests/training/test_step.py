import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank import methods
from lowrank.core import sharding, tree, weight
from lowrank.training import optimizer as optim
from lowrank.training import step
from lowrank.training.optimizer import OptimConfig
from tests.support.close import assert_close

L, D, B = 4, 64, 16  # layers, width, batch
LR = np.float32(0.01)


def _loss(params, batch, rng):
    """A residual stack of two matmuls a layer, weighted squared error."""
    del rng

    def block(x_BxD, layer):
        return x_BxD + jnp.tanh(weight.dot(x_BxD, layer["attn"]["q"]["kernel"])) @ layer["attn"]["o"]["kernel"], None

    out_BxD = jax.lax.scan(block, batch["x"], params["layers"])[0]
    error_B = jnp.sum((out_BxD - batch["y"]) ** 2, -1)
    return jnp.sum(error_B * batch["weights"]), jnp.sum(batch["weights"])


def _params(width=D, layers=L):
    keys = jax.random.split(jax.random.key(0), 2)
    q, o = (jax.random.normal(k, (layers, width, width)) * 0.3 / width**0.5 for k in keys)
    return {"layers": {"attn": {"q": {"kernel": q}, "o": {"kernel": o}}}}


def _batch(mesh, width=D, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=B).astype(np.float32)  # uneven: a mean of microbatch means would be wrong
    rows = {"x": rng.normal(size=(B, width)), "y": rng.normal(size=(B, width)), "weights": weights}
    return sharding.global_batch({k: v.astype(np.float32) for k, v in rows.items()}, mesh)


@functools.cache
def _made(full=False, sizes=(1, 1, 1), width=D, layers=L, loss=_loss, **options):
    mesh = sharding.make_mesh(*sizes)
    method = methods.full() if full else methods.lora(rank=4)
    params = methods.attach(method, _params(width, layers), jax.random.key(1))
    params = jax.device_put(params, sharding.shardings(params, mesh))
    trained, frozen = tree.split(params, weight.declared_mask(params, method.train))
    config = OptimConfig(**options)
    optimizer = optim.build_optimizer(config, 10, trained)
    state, batch = step.init(trained, optimizer, mesh, config.paged), _batch(mesh, width)
    fn = step.make_step(loss, optimizer, seed=0, accumulate=config.accumulate)
    return step.compile_step(fn, state, frozen, batch), state, frozen, batch, mesh


def _setup(**options):
    """`(compiled step, state, frozen, batch, mesh)`; the state is a copy that may be donated."""
    compiled, state, *rest = _made(**options)
    return compiled, jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state), *rest


def _bytes(values):
    return sum(x.nbytes for x in jax.tree.leaves(values))


def test_a_step_is_the_gradient_step_by_hand():
    compiled, state, frozen, batch, _ = _setup(full=True, name="sgd", clip=0)
    before = jax.device_get(state.trained)

    def mean(params):
        total, weights = _loss(params, batch, None)
        return total / weights

    loss, gradient = jax.value_and_grad(mean)(jax.device_put(before))
    state, metrics = compiled(state, frozen, batch, LR)
    want = jax.tree.map(lambda p, g: p - 0.01 * g, before, jax.device_get(gradient))
    assert_close(state.trained, want)
    assert_close(metrics["loss"], loss)
    assert_close(metrics["grad_norm"], optax.tree.norm(gradient))
    assert int(state.step) == 1


@pytest.mark.parametrize(("accumulate", "sizes"), [(2, (2, 1, 1)), (4, (1, 1, 1))])
def test_accumulation_equals_the_large_batch(accumulate, sizes):
    compiled, state, frozen, batch, _ = _setup(sizes=sizes, name="sgd")
    whole, want = compiled(state, frozen, batch, LR)
    compiled, state, frozen, batch, _ = _setup(sizes=sizes, name="sgd", accumulate=accumulate)
    parts, got = compiled(state, frozen, batch, LR)
    for key in ("loss", "grad_norm", "weight"):
        assert_close(got[key], want[key])
    assert_close(parts.trained, whole.trained)


def test_training_lowers_the_loss_and_touches_no_frozen_byte():
    compiled, state, frozen, batch, _ = _setup()
    before, losses = jax.device_get(frozen), []
    for _ in range(5):
        state, metrics = compiled(state, frozen, batch, LR)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(frozen)))


def test_several_steps_compile_once():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
    try:
        compiled, state, frozen, _, mesh = _setup(clip=0.5)  # a program of its own: the listener must hear it compiled
        batches = [_batch(mesh, seed=i) for i in range(4)]
        before = seen.count("/jax/core/compile/backend_compile_duration")
        for batch in batches:
            state, _ = compiled(state, frozen, batch, LR)
    finally:
        jax.monitoring.clear_event_listeners()
    assert before > 0
    assert seen.count("/jax/core/compile/backend_compile_duration") == before


def test_the_learning_rate_is_an_argument_of_the_program():
    compiled, state, frozen, batch, _ = _setup(name="sgd", clip=0)
    before = jax.device_get(state.trained)
    once, metrics = compiled(state, frozen, batch, LR)
    _, state, *_ = _setup(name="sgd", clip=0)
    thrice, _ = compiled(state, frozen, batch, 3 * LR)
    assert metrics["lr"] == LR
    moved = lambda after: jax.tree.map(lambda x, y: np.asarray(x) - y, after.trained, before)  # noqa: E731
    jax.tree.map(lambda x, y: assert_close(3 * x, y), moved(once), moved(thrice))


def test_a_batch_of_another_shape_is_refused_rather_than_compiled():
    compiled, state, frozen, _, mesh = _setup()
    half = sharding.global_batch({"x": np.ones((8, D), np.float32), "y": np.ones((8, D), np.float32)}, mesh)
    with pytest.raises(TypeError):
        compiled(state, frozen, half | {"weights": jnp.ones(8)}, LR)


def test_frozen_leaves_have_no_gradient_no_moment_and_no_copy():
    compiled, state, frozen, _, _ = _setup(width=256, layers=16)
    memory, trained = compiled.memory_analysis(), _bytes(state.trained)
    assert memory.argument_size_in_bytes < 1.05 * (_bytes(frozen) + _bytes(state))
    assert memory.output_size_in_bytes < _bytes(state) + 1024
    assert memory.alias_size_in_bytes == _bytes(state)  # the state is donated
    assert memory.temp_size_in_bytes < _bytes(frozen) / 4  # a gradient of the frozen leaves alone would be all of it
    assert _bytes(state) < 3.1 * trained
    trained_shapes = {x.shape for x in jax.tree.leaves(state.trained)} | {()}
    assert {x.shape for x in jax.tree.leaves(state.optimizer)} <= trained_shapes


def test_full_fine_tuning_does_need_that_memory():
    compiled, state, _, _, _ = _setup(full=True, width=256, layers=16)
    assert _bytes(state) > 2.9 * _bytes(state.trained)
    assert compiled.memory_analysis().temp_size_in_bytes > _bytes(state.trained) / 2


def test_randomness_depends_on_the_seed_and_the_step_alone():
    def loss(params, batch, rng):
        total, weights = _loss(params, batch, rng)
        return total * jax.random.uniform(rng), weights

    compiled, state, frozen, batch, mesh = _setup(loss=loss, name="sgd")
    first = []
    for _ in range(3):
        state, metrics = compiled(state, frozen, batch, np.float32(0))
        first.append(float(metrics["loss"]))
    compiled, state, frozen, batch, _ = _setup(loss=loss, name="sgd")
    state = dataclasses.replace(state, step=jax.device_put(jnp.int32(2), sharding.replicated(mesh)))
    _, metrics = compiled(state, frozen, batch, np.float32(0))
    assert len(set(first)) == 3
    assert float(metrics["loss"]) == first[2]
