import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank.core import sharding
from tests.support.close import assert_close
from tests.support.decoder_steps import count_bytes
from tests.support.tiny_steps import LR, D, build_step, squared_error, stack_batch


def test_a_step_is_the_gradient_step_by_hand():
    compiled, state, frozen, batch, _ = build_step(full=True, name="sgd", clip=0)
    before = jax.device_get(state.trained)

    def mean(params):
        total, weights, _ = squared_error(params, batch, None)
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
    compiled, state, frozen, batch, _ = build_step(sizes=sizes, name="sgd")
    whole, want = compiled(state, frozen, batch, LR)
    compiled, state, frozen, batch, _ = build_step(sizes=sizes, name="sgd", accumulate=accumulate)
    parts, got = compiled(state, frozen, batch, LR)
    for key in ("loss", "grad_norm", "weight"):
        assert_close(got[key], want[key])
    assert_close(parts.trained, whole.trained)


def test_training_lowers_the_loss_and_touches_no_frozen_byte():
    compiled, state, frozen, batch, _ = build_step()
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
        compiled, state, frozen, _, mesh = build_step(clip=0.5)  # a new program: the listener must hear it compiled
        batches = [stack_batch(mesh, seed=i) for i in range(4)]
        before = seen.count("/jax/core/compile/backend_compile_duration")
        for batch in batches:
            state, _ = compiled(state, frozen, batch, LR)
    finally:
        jax.monitoring.clear_event_listeners()
    assert before > 0
    assert seen.count("/jax/core/compile/backend_compile_duration") == before


def test_the_learning_rate_is_an_argument_of_the_program():
    compiled, state, frozen, batch, _ = build_step(name="sgd", clip=0)
    before = jax.device_get(state.trained)
    once, metrics = compiled(state, frozen, batch, LR)
    _, state, *_ = build_step(name="sgd", clip=0)
    thrice, _ = compiled(state, frozen, batch, 3 * LR)
    assert metrics["lr"] == LR
    moved = lambda after: jax.tree.map(lambda x, y: np.asarray(x) - y, after.trained, before)  # noqa: E731
    jax.tree.map(lambda x, y: assert_close(3 * x, y), moved(once), moved(thrice))


def test_a_batch_of_another_shape_is_refused_rather_than_compiled():
    compiled, state, frozen, _, mesh = build_step()
    half = sharding.make_global_batch({"x": np.ones((8, D), np.float32), "y": np.ones((8, D), np.float32)}, mesh)
    with pytest.raises(TypeError):
        compiled(state, frozen, half | {"weights": jnp.ones(8)}, LR)


def test_frozen_leaves_have_no_gradient_no_moment_and_no_copy():
    compiled, state, frozen, _, _ = build_step(width=256, layers=16)
    memory, trained = compiled.memory_analysis(), count_bytes(state.trained)
    assert memory.argument_size_in_bytes < 1.05 * (count_bytes(frozen) + count_bytes(state))
    assert memory.output_size_in_bytes < count_bytes(state) + 1024
    assert memory.alias_size_in_bytes == count_bytes(state)  # the state is donated
    assert memory.temp_size_in_bytes < count_bytes(frozen) / 4  # their gradient alone would be all of it
    assert count_bytes(state) < 3.1 * trained
    trained_shapes = {x.shape for x in jax.tree.leaves(state.trained)} | {()}
    assert {x.shape for x in jax.tree.leaves(state.optimizer)} <= trained_shapes


def test_full_fine_tuning_does_need_that_memory():
    compiled, state, _, _, _ = build_step(full=True, width=256, layers=16)
    assert count_bytes(state) > 2.9 * count_bytes(state.trained)
    assert compiled.memory_analysis().temp_size_in_bytes > count_bytes(state.trained) / 2


def test_randomness_depends_on_the_seed_and_the_step_alone():
    def loss(params, batch, rng):
        sums = squared_error(params, batch, rng)
        return sums._replace(total=sums.total * jax.random.uniform(rng))

    compiled, state, frozen, batch, mesh = build_step(loss=loss, name="sgd")
    first = []
    for _ in range(3):
        state, metrics = compiled(state, frozen, batch, np.float32(0))
        first.append(float(metrics["loss"]))
    compiled, state, frozen, batch, _ = build_step(loss=loss, name="sgd")
    state = dataclasses.replace(state, step=jax.device_put(jnp.int32(2), sharding.replicated_sharding(mesh)))
    _, metrics = compiled(state, frozen, batch, np.float32(0))
    assert len(set(first)) == 3
    assert float(metrics["loss"]) == first[2]
