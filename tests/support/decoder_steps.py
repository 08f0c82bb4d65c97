"""A compiled step on a decoder, and the bytes of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import methods
from lowrank.core import sharding, tree, weight
from lowrank.models import DecoderConfig, build_model
from lowrank.objectives.causal_lm import language_loss
from lowrank.training import optimizer as optim
from lowrank.training import step
from lowrank.training.optimizer import OptimConfig

B, T = 8, 32


@functools.cache
def tiny_decoder(width=64, layers=2, vocab=64):
    config = DecoderConfig(
        vocab_size=vocab,
        max_positions=T,
        width=width,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=width // 4,
        hidden=2 * width,
    )
    model = build_model(config)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def decoder_batch(mesh, vocab):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (B, T + 1)).astype(np.int32)
    segments = np.repeat(1 + np.arange(T)[None] // 20, B, 0).astype(np.int32)
    positions = np.repeat(np.arange(T)[None] % 20, B, 0).astype(np.int32)
    weights = rng.uniform(size=(B, T)).astype(np.float32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segments": segments}
    return sharding.make_global_batch({**rows, "weights": weights}, mesh, {*rows, "weights"})


def compile_on_decoder(method, sizes, rows, **shape):
    """`(compiled step, state, frozen, batch)` of a decoder."""
    model, params = tiny_decoder(**shape)
    mesh = sharding.make_mesh(*sizes)
    params = methods.attach(method, params, jax.random.key(1))
    # B starts at zero, and A would have no gradient.
    params = tree.map_named(lambda n, x: x + 0.1 if n.endswith("/b") else x, params)
    params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    trained, frozen = tree.split(params, weight.declared_mask(params, method.trainable))
    config = OptimConfig(name="sgd", clip=0)
    optimizer = optim.build_optimizer(config, 10, trained)
    state, batch = step.init_state(trained, optimizer, mesh), decoder_batch(mesh, model.config.vocab_size)

    def loss(params, batch, rng):
        return language_loss(model, params, batch, rows)

    fn = step.make_step(loss, optimizer, seed=0)
    return step.compile_step(fn, state, frozen, batch), state, frozen, batch


def count_bytes(values):
    return sum(x.nbytes for x in jax.tree.leaves(values))
