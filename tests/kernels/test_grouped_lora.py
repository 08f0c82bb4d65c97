"""The low-rank products of many adapters in one batch against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.kernels.grouped_lora import gpu, plain
from lowrank.kernels.grouped_lora.dispatch import check_ids, grouped_lora, stack_adapters
from lowrank.kernels.grouped_lora.steps import plan_steps
from tests.support.close import assert_close
from tests.support.gpu_interpreter import interpreted

FORMS = {
    "masked": plain.multiply_masked,
    "sorted": plain.multiply_sorted,
    "interpret": lambda *arrays: grouped_lora(*arrays, implementation="interpret"),
}


def case(ranks, rows, width=24, out=40, dtype=jnp.float32, none=0):
    """Adapters of these ranks, none of which the second has rows of, and rows of which `none` have no adapter."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    adapters = [(draw(width, r), draw(r, out), 0.5 + i) for i, r in enumerate(ranks)]
    with_rows = [i for i in range(len(ranks)) if i != 1]
    ids = np.append(rng.choice(with_rows, rows - none), [-1, len(ranks), -7, 2**31 - 1][:none]).astype(np.int32)
    return adapters, draw(rows, width), rng.permutation(ids)


def expected(adapters, x, ids):
    out = np.zeros((len(x), adapters[0][1].shape[1]))
    for i, g in enumerate(ids):
        if 0 <= g < len(adapters):
            a, b, scale = (np.asarray(v, np.float64) for v in adapters[g])
            out[i] = scale * (np.asarray(x[i], np.float64) @ a) @ b
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ranks", "rows", "dtype", "relative"),
    [
        ((4, 1, 7), 37, jnp.float32, 5e-6),
        ((1, 1), 1, jnp.float32, 5e-6),
        ((512, 3, 16), 150, jnp.bfloat16, 2e-2),
        ((5, 8, 3), 300, jnp.float16, 4e-3),
    ],
)
def test_each_row_meets_its_own_adapter(form, ranks, rows, dtype, relative):
    adapters, x, ids = case(ranks, rows, dtype=dtype, none=min(4, rows - 1))
    y = jax.jit(FORMS[form])(x, *stack_adapters(adapters), ids)
    assert y.dtype == dtype
    assert_close(np.asarray(y, np.float64), expected(adapters, x, ids), relative=relative)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("broken", ["a", "b", "scale"])
def test_a_nan_in_one_adapter_reaches_no_other_row(form, broken):
    adapters, x, ids = case((3, 2, 4), 40, none=2)
    a, b, scale = stack_adapters(adapters)
    arrays = {"a": a, "b": b, "scale": scale}
    arrays[broken] = arrays[broken].at[2].set(jnp.nan) if broken != "b" else b.at[2, 1, 5].set(jnp.inf)
    y = np.asarray(FORMS[form](x, *arrays.values(), ids))
    assert not np.isfinite(y[ids == 2]).all(axis=1).any()
    assert_close(y[ids != 2], expected(adapters, x, ids)[ids != 2])


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_an_adapter_are_zero_and_teach_none(form):
    adapters, x, _ = case((3, 2), 5)
    stacked, ids = stack_adapters(adapters), np.array([-1, 2, -5, 7, 2**31 - 1], np.int32)
    assert not np.any(FORMS[form](x, *stacked, ids))
    gradients = jax.grad(lambda *v: jnp.sum(grouped_lora(*v, ids)), argnums=(0, 1, 2, 3))(x, *stacked)
    assert not any(map(np.any, gradients))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_gradients_are_those_of_a_gather_by_row(implementation):
    adapters, x, ids = case((3, 2, 4), 21)
    stacked = stack_adapters(adapters)

    def gathered(x, a, b, scale):
        return jnp.einsum("ti,tri,tro->to", x, a[ids], b[ids]) * scale[ids][:, None]

    def ours(x, a, b, scale):
        return grouped_lora(x, a, b, scale, ids, implementation)

    g = jax.random.normal(jax.random.key(5), (21, stacked[1].shape[-1]))
    grads = [jax.grad(lambda *v, f=f: jnp.sum(f(*v) * g), argnums=(0, 1, 2, 3)) for f in (ours, gathered)]
    assert_close(grads[0](x, *stacked), grads[1](x, *stacked))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_nan_in_one_adapter_reaches_no_other_gradient(broken):
    adapters, x, ids = case((3, 2, 4), 40, none=2)
    stacked = list(stack_adapters(adapters))

    def gradients(*stacked):
        return jax.grad(lambda *v: jnp.sum(grouped_lora(*v, ids) ** 2), argnums=(0, 1, 2, 3))(x, *stacked)

    exact = [np.asarray(g) for g in gradients(*stacked)]
    stacked[broken] = stacked[broken].at[2].set(jnp.nan)
    dx, *found = [np.asarray(g) for g in gradients(*stacked)]
    assert_close(dx[ids != 2], exact[0][ids != 2])
    assert_close(tuple(f[:2] for f in found), tuple(e[:2] for e in exact[1:]))
    assert not any(np.isfinite(f).any() for f in (dx[ids == 2], *(f[2] for f in found)))


@pytest.mark.parametrize(
    ("ranks", "rows", "dtype", "relative"),
    [((4, 1, 7), 135, jnp.bfloat16, 2e-2), ((1, 1), 1, jnp.bfloat16, 2e-2), ((72, 3, 16), 70, jnp.float16, 4e-3)],
)
def test_the_gpu_body_meets_each_rows_own_adapter(ranks, rows, dtype, relative):
    adapters, x, ids = case(ranks, rows, dtype=dtype, none=min(4, rows - 1))
    a, b, scale = stack_adapters(adapters)
    b = b.at[-1].set(jnp.where(rows > 1, jnp.nan, b[-1]))
    with interpreted():
        y = np.asarray(jax.jit(gpu.multiply)(x, a, b, scale, ids), np.float64)
    whole = (ids != len(ranks) - 1) | (rows == 1)
    assert_close(y[whole], expected(adapters, x, ids)[whole], relative=relative)
    assert np.isnan(y[~whole]).all()


@pytest.mark.parametrize(
    ("rows", "adapters", "rank", "width", "out"),
    [(256, 64, 16, 4096, 4096), (8192, 4, 512, 4096, 14336), (37, 3, 7, 24, 40), (1, 1, 1, 8, 8)],
)
def test_the_gpu_body_lowers(rows, adapters, rank, width, out):
    shapes = ((rows, width), (adapters, rank, width), (adapters, rank, out))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct((adapters,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    run = functools.partial(grouped_lora, implementation="pallas_gpu")
    assert "mosaic_gpu" in jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_what_the_gpu_body_cannot_take_is_refused():
    adapters, x, ids = case((513, 2), 4)
    with pytest.raises(UserError, match="bfloat16 or float16 and ranks to 512, not float32 and 513: use 'xla'"):
        grouped_lora(x, *stack_adapters(adapters), ids, "pallas_gpu")


def test_every_tile_of_rows_is_visited_once_for_each_of_its_adapters():
    keys = jnp.asarray(np.repeat([0, 2, 3], [130, 6, 248]), jnp.int32)
    group, tile = plan_steps(keys, 3, 128)
    assert list(zip(group.tolist(), tile.tolist(), strict=True)) == [(0, 0), (0, 1), (2, 1), (3, 1), (3, 2), (3, 2)]


def test_ids_and_adapters_are_checked_on_the_host():
    check_ids(np.array([-1, 0, 2]), 3)
    with pytest.raises(UserError, match=r"ids \[-2, 3\] are not loaded: an id is -1 for none or 0 to 2"):
        check_ids(np.array([0, 3, -2]), 3)
    narrow, wide = ((jnp.ones((n, 2)), jnp.ones((2, 5)), 1.0) for n in (3, 4))
    with pytest.raises(UserError, match="must be of one kernel"):
        stack_adapters([narrow, wide])
