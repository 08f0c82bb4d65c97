"""GaLore beside the paper's formulas in float64 NumPy, and beside optax's where that one follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import scale_by_galore

from lowrank import methods
from lowrank.core.errors import UserError
from lowrank.methods.galore import project_gradients
from lowrank.training.optimizer import OptimConfig, build_optimizer
from tests.support.close import assert_close
from tests.support.tiny_parameters import attached

RANK, EVERY, SCALE, LR, STEPS = 2, 3, 0.5, 0.1, 7
SHAPES = {"wide/kernel": (2, 5, 8), "tall/kernel": (2, 8, 5), "norm": (4,)}


def leaves(rng, shapes):
    tree = {}
    for name, shape in shapes.items():
        first, _, last = name.partition("/")
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        tree[first] = {last: x} if last else x
    return tree


def adam(gradients):
    """The steps of Adam on these gradients, in float64."""
    m = v = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        yield -LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def expected(gradients):
    """Algorithm 2 for one matrix `[in, out]`: its updates, with the shorter side projected."""
    sides, low = [], []
    for t, g in enumerate(gradients):
        if t % EVERY == 0:
            u, _, v = np.linalg.svd(g)
            p, q = (u[:, :RANK], None) if g.shape[0] <= g.shape[1] else (None, v[:RANK].T)
        sides.append((p, q))
        low.append(p.T @ g if q is None else g @ q)
    return [SCALE * (p @ n if q is None else n @ q.T) for (p, q), n in zip(sides, adam(low), strict=True)]


def test_the_updates_are_those_of_the_papers_algorithm():
    rng = np.random.default_rng(0)
    trained, gradients = leaves(rng, SHAPES), [leaves(rng, SHAPES) for _ in range(EVERY)]
    optimizer = project_gradients(optax.adam(LR), RANK, EVERY, SCALE, ".*kernel")
    state, step, ours = optimizer.init(trained), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = step(gradient, state, trained)
        ours.append(updates)
    for name in ("wide", "tall"):
        for layer in range(2):
            want = expected([np.asarray(g[name]["kernel"][layer], np.float64) for g in gradients])
            for u, w in zip(ours, want, strict=True):
                assert_close(u[name]["kernel"][layer], w, relative=1e-4)
    for u, w in zip(ours, adam([np.asarray(g["norm"], np.float64) for g in gradients]), strict=True):
        assert_close(u["norm"], w, relative=1e-4)


def test_a_square_kernel_moves_as_in_optax_across_new_projections():
    rng = np.random.default_rng(1)
    gradients = [{"kernel": jnp.asarray(rng.standard_normal((6, 6)), jnp.float32)} for _ in range(STEPS)]
    mine = project_gradients(optax.scale_by_adam(), RANK, EVERY, SCALE, "kernel")
    other = scale_by_galore(RANK, EVERY, SCALE, optax.scale_by_adam())
    trained = jax.tree.map(jnp.zeros_like, gradients[0])
    a, b = mine.init(trained), other.init(trained)
    for gradient in gradients:
        x, a = jax.jit(mine.update)(gradient, a, trained)
        y, b = jax.jit(other.update)(gradient, b, trained)
        assert_close(x["kernel"], y["kernel"])


def test_moments_are_kept_in_the_projected_space():
    trained = leaves(np.random.default_rng(0), SHAPES)
    state = project_gradients(optax.scale_by_adam(), RANK, EVERY, SCALE, ".*kernel").init(trained)
    assert state.inner.mu["wide"]["kernel"].shape == (2, RANK, 8)
    assert state.inner.mu["tall"]["kernel"].shape == (2, 8, RANK)
    assert state.inner.mu["norm"].shape == (4,)
    assert state.projectors["tall"]["kernel"].shape == (2, 5, RANK)
    assert 0 not in [x.size for x in jax.tree.leaves(state)]  # a checkpoint holds no empty array


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(UserError, match=r"rank 64 is larger than min\(in, out\) = 8 of layers/attn/q/kernel"):
        attached(name="galore", target="layers/attn/q/kernel")
    with pytest.raises(UserError, match=r"method\.every must be positive, not 0"):
        attached(name="galore", every=0)


def authors_adamw(w, gradients, decay, clip):
    """`w` `[out, in]` after each step of `galore_torch.AdamW` on clipped gradients, in float64."""
    m = v = 0.0
    for t, g in enumerate(gradients):
        g = g * min(1.0, clip / np.linalg.norm(g))
        if t % EVERY == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            right = g.shape[0] >= g.shape[1]
            q = vh[:RANK].T if right else u[:, :RANK]
        low = g @ q if right else q.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        size = LR * np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        n = m / (np.sqrt(v) + 1e-12)
        w = w - size * SCALE * (n @ q.T if right else q @ n)
        w = w - LR * decay * w
        yield w


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_decay_and_clip_act_on_the_whole_matrix_as_in_the_authors_optimizer(shape):
    decay, clip, rng = 0.1, 0.5, np.random.default_rng(2)
    hook = methods.build_method(
        {"name": "galore", "rank": RANK, "every": EVERY, "scale": SCALE, "target": "kernel"}
    ).hooks.rescaling
    start, *gradients = rng.standard_normal((EVERY + 1, *shape))  # a new projection has other signs
    trained = {"kernel": jnp.asarray(start, jnp.float32)}
    config = OptimConfig(lr=LR, schedule="constant", weight_decay=decay, clip=clip, args={"eps": 1e-12})
    optimizer = build_optimizer(config, STEPS, trained, hook)
    state = optimizer.init(trained)
    for g, want in zip(gradients, authors_adamw(start.T, [g.T for g in gradients], decay, clip), strict=True):
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, trained, lr=LR)
        # The authors decay the weight after its update, and AdamW before it.
        trained = jax.tree.map(lambda w, u: (w + u + LR * decay * w) * (1 - LR * decay), trained, updates)
        assert_close(trained["kernel"], want.T, relative=1e-5)
