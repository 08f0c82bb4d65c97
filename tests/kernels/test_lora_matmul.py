"""The product with a low-rank update against float64, and what its backward pass keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.kernels.lora_matmul import gpu, plain, tpu
from lowrank.kernels.lora_matmul.dispatch import lora_matmul
from tests.support.close import assert_close
from tests.support.gpu_interpreter import interpreted

SCALE = 1.5
RELATIVE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}
CASES = [  # rows, inputs, outputs, rank
    ((1, 1), 24, 40, 1, jnp.float32),
    ((37,), 100, 7, 5, jnp.float32),
    ((2, 33), 130, 200, 16, jnp.bfloat16),
    ((3,), 64, 96, 512, jnp.bfloat16),
    ((1,), 65, 129, 3, jnp.float16),
]


def case(rows, inputs, outputs, rank, dtype):
    rng = np.random.default_rng(0)
    shapes = ((*rows, inputs), (inputs, outputs), (inputs, rank), (rank, outputs))
    x, w, a, b = (jnp.asarray(rng.standard_normal(s) * s[-2 if i else -1] ** -0.5) for i, s in enumerate(shapes))
    return x.astype(dtype), w.astype(dtype), a.astype(jnp.float32), b.astype(jnp.float32), jnp.float32(SCALE)


def exact(x, w, a, b, g):
    """The product and the gradients of `x`, A and B, for the cotangent `g`."""
    wide = [np.asarray(v, np.float64) for v in (x, w, a, b, g)]
    x, w, a, b, g = (v.reshape(-1, v.shape[-1]) for v in wide)
    u = SCALE * g @ b.T
    y, dx = x @ w + SCALE * (x @ a) @ b, g @ w.T + u @ a.T
    return y.reshape(wide[4].shape), dx.reshape(wide[0].shape), x.T @ u, SCALE * (x @ a).T @ g


def product_and_gradients(multiply, x, w, a, b, scale, g):
    y, pullback = jax.vjp(lambda x, a, b: multiply(x, w, a, b, scale), x, a, b)
    return y, *pullback(g.astype(y.dtype))


def cotangent(x, w):
    return jnp.asarray(np.random.default_rng(1).standard_normal((*x.shape[:-1], w.shape[1])), x.dtype)


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank", "dtype"), CASES)
@pytest.mark.parametrize("implementation", ["auto", "interpret"])
def test_the_product_and_its_gradients_meet_float64(implementation, rows, inputs, outputs, rank, dtype):
    x, *others = case(rows, inputs, outputs, rank, dtype)
    g = cotangent(x, others[0])
    multiply = functools.partial(lora_matmul, implementation=implementation)
    found = jax.jit(functools.partial(product_and_gradients, multiply))(x, *others, g)
    assert [v.dtype for v in found] == [dtype, dtype, jnp.float32, jnp.float32]
    for ours, theirs in zip(found, exact(x, *others[:-1], g), strict=True):
        assert_close(np.float64(ours), theirs, relative=RELATIVE[dtype])


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank", "dtype"), CASES)
def test_one_longer_product_meets_float64(rows, inputs, outputs, rank, dtype):
    x, *others = case(rows, inputs, outputs, rank, dtype)
    g = cotangent(x, others[0])
    y, _ = plain.multiply_at_once(x, *others, dtype=dtype)
    _, dx, _ = plain.gradient_at_once(g, *others)
    for ours, theirs in zip((y, dx), exact(x, *others[:-1], g), strict=False):
        assert_close(np.float64(ours), theirs, relative=RELATIVE[dtype])


def kept_shapes(*learned):
    """The shapes that the backward pass keeps beside the weights, where the arguments of these indices are learned."""
    arrays = case((2, 9), 24, 40, 3, jnp.bfloat16)

    def pullback(*arrays):
        def of_learned(*values):
            given = dict(enumerate(arrays)) | dict(zip(learned, values, strict=True))
            return lora_matmul(*given.values())

        return jax.vjp(of_learned, *(arrays[i] for i in learned))[1]

    weights = [x.shape for x in arrays[1:]]
    return [v.aval.shape for v in jax.make_jaxpr(pullback)(*arrays).jaxpr.outvars if v.aval.shape not in weights]


def test_the_backward_pass_keeps_the_input_for_a_alone_and_the_short_product_for_b_alone():
    x, t = (2, 9, 24), (2, 9, 3)
    assert sorted(kept_shapes(0, 2, 3)) == [t, x]
    assert kept_shapes(0, 2) == [x]
    assert kept_shapes(0, 3) == [t]
    assert kept_shapes(0) == []


def test_a_kernel_or_a_scale_that_is_learned_has_its_gradient():
    x, w, a, b, scale = case((5,), 12, 9, 2, jnp.float32)
    g = cotangent(x, w)
    dw, dscale = jax.grad(lambda w, s: jnp.sum(lora_matmul(x, w, a, b, s) * g), argnums=(0, 1))(w, scale)
    x, a, b, g = (np.float64(v) for v in (x, a, b, g))
    assert_close(dw, x.T @ g)
    assert_close(dscale, np.sum((x @ a @ b) * g))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_a_named_body_that_the_platform_lacks_is_refused(implementation):
    with pytest.raises(UserError, match=f"implementation='{implementation}' of lora_matmul cannot run"):
        lora_matmul(*case((4,), 8, 8, 2, jnp.bfloat16), implementation=implementation)


@pytest.mark.parametrize(("implementation", "dtype"), [("pallas_tpu", jnp.float16), ("pallas_gpu", jnp.float32)])
def test_a_dtype_that_a_named_body_cannot_take_is_refused(implementation, dtype):
    with pytest.raises(UserError, match=f"lora_matmul takes bfloat16 or .*, not {dtype.__name__}: use 'xla'$"):
        lora_matmul(*case((4,), 8, 8, 2, dtype), implementation=implementation)


def test_the_tpu_body_adds_tile_by_tile_what_does_not_fit_into_vmem(monkeypatch):
    for name, value in {"VMEM": 70_000, "CHUNK": 16, "WIDTH": 8, "TILES": [(64, 32), (32, 16)]}.items():
        monkeypatch.setattr(tpu, name, value)
    assert tpu._tile_sizes(70, 50, 72, 4, 4) == (64, 32)
    x, *others = case((70,), 50, 72, 3, jnp.float32)
    g = cotangent(x, others[0])
    multiply = functools.partial(lora_matmul, implementation="interpret")
    assert_close(product_and_gradients(multiply, x, *others, g), exact(x, *others[:-1], g))
    with pytest.raises(UserError, match="a kernel of 4096 inputs is too long"):
        tpu._tile_sizes(70, 4096, 72, 4, 4)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "dtype"),
    [
        ((1, 1), 24, 40, 1, jnp.bfloat16),
        ((2, 70), 130, 200, 16, jnp.bfloat16),
        ((3,), 64, 96, 512, jnp.bfloat16),
        ((5,), 65, 129, 3, jnp.float16),
    ],
)
def test_the_gpu_body_meets_float64(rows, inputs, outputs, rank, dtype):
    x, *others = case(rows, inputs, outputs, rank, dtype)
    g = cotangent(x, others[0])
    with interpreted():
        y, t = jax.jit(functools.partial(gpu.multiply, dtype=dtype))(x, *others)
        none, dx, u = jax.jit(gpu.gradient)(g, *others)
    assert t.shape == u.shape == (*rows, rank)
    assert not np.any(np.asarray(none))
    for ours, theirs in zip((y, dx), exact(x, *others[:-1], g), strict=False):
        assert ours.dtype == dtype
        assert_close(np.float64(ours), theirs, relative=RELATIVE[dtype])


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank"), [(8192, 4096, 14336, 16), (8192, 4096, 4096, 512), (1, 7, 5, 1)]
)
def test_the_gpu_bodies_lower(rows, inputs, outputs, rank):
    shapes = ((rows, inputs), (inputs, outputs), (inputs, rank), (rank, outputs), ())
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if i < 2 else jnp.float32) for i, s in enumerate(shapes)]

    def both(x, *others):
        y, pullback = jax.vjp(lambda x: lora_matmul(x, *others, implementation="pallas_gpu"), x)
        return pullback(y)

    text = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
