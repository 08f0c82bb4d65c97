"""Products in bfloat16: the values of the plain product, and what each platform is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core.weight import dot
from lowrank.kernels import half_precision_matmul
from lowrank.weights.lora import LoRA
from tests.support.close import FLOAT32, assert_close


def case(axis, dtype=jnp.bfloat16):
    shape = (7, 5) if axis == 0 else (5, 7)
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 7)), jax.random.normal(jax.random.key(1), shape)
    return x.astype(dtype), w.astype(dtype)


def plain(x, w, axis):
    return jnp.dot(x, w if axis == 0 else w.T)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_values_and_gradients_are_those_of_the_plain_product(axis, dtype):
    x, w = case(axis, dtype)
    y, pull = jax.vjp(lambda x, w: half_precision_matmul.matmul(x, w, axis), x, w)
    expected, expected_pull = jax.vjp(lambda x, w: plain(x, w, axis), x, w)
    g = jnp.cos(expected)
    for ours, theirs in zip((y, *pull(g)), (expected, *expected_pull(g)), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert_close(ours, theirs, relative=max(FLOAT32, 2 * float(jnp.finfo(dtype).eps)))


def test_the_product_is_rounded_once():
    x, w = case(0)
    exact = np.float64(x) @ np.float64(w)
    np.testing.assert_array_equal(half_precision_matmul.matmul(x, w), jnp.asarray(exact, jnp.bfloat16))


def test_a_kernel_in_float32_is_rounded_to_the_activations_and_its_gradient_is_float32():
    x, w = case(0)[0], case(0, jnp.float32)[1]
    assert half_precision_matmul.matmul(x, w).dtype == jnp.bfloat16
    assert jax.grad(lambda w: jnp.sum(half_precision_matmul.matmul(x, w)).astype(jnp.float32))(w).dtype == jnp.float32


@pytest.mark.parametrize(("platform", "out"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_only_a_cpu_is_asked_for_float32(platform, out):
    def both(x, w, g):
        y, pull = jax.vjp(half_precision_matmul.matmul, x, w)
        return y, pull(g)[0]

    x, w = case(0)
    text = jax.jit(both).trace(x, w, jnp.zeros((2, 3, 5), x.dtype)).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("xbf16>, tensor" in line and line.endswith(f"x{out}>") for line in products)


@pytest.mark.parametrize("multiply", [half_precision_matmul.matmul, half_precision_matmul.matmul_to_float32])
def test_the_inputs_are_kept_only_for_the_gradient_of_a_kernel(multiply):
    x, w = case(0)
    shapes = lambda *argnums: [  # noqa: E731
        v.aval.shape
        for v in jax.make_jaxpr(
            lambda x, w: jax.vjp(
                lambda *some: multiply(*(dict(enumerate((x, w))) | dict(zip(argnums, some, strict=True))).values()),
                *((x, w)[i] for i in argnums),
            )[1]
        )(x, w).jaxpr.outvars
    ]
    assert x.shape not in shapes(0)
    assert x.shape in shapes(0, 1)


def test_vectorizes_over_a_stack_of_kernels():
    x, w = case(0)
    many = jax.vmap(half_precision_matmul.matmul, in_axes=(None, 0))(x, jnp.stack([w, -w]))
    np.testing.assert_array_equal(
        many, jnp.stack([half_precision_matmul.matmul(x, w), -half_precision_matmul.matmul(x, w)])
    )


@pytest.mark.parametrize("product", [half_precision_matmul.matmul, half_precision_matmul.matmul_to_float32])
@pytest.mark.parametrize("axis", [0, 1])
def test_float32_rows_and_a_bfloat16_kernel_round_operands_alone(axis, product):
    x, w = case(axis, jnp.float32)[0], case(axis)[1]
    y, pull = jax.vjp(lambda x, w: product(x, w, axis), x, w)
    g = jnp.cos(y)
    dx, dw = pull(g)
    rows, kernel, slope = (np.float64(v.astype(jnp.bfloat16)) for v in (x, w if axis == 0 else w.T, g))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert_close(y, rows @ kernel)
    assert_close(dx, slope @ kernel.T)
    exact = np.einsum("abi,abo->io", rows, slope)
    assert_close(dw, exact if axis == 0 else exact.T, relative=float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_mixed_policy_asks_for_float32_in_both_directions(platform):
    def step(a, w, x):
        loss = lambda a, x: jnp.sum(jnp.sin(dot(x, LoRA(base=w, a=a, b=jnp.ones((2, 5)), scale=jnp.float32(1)))))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(a, x)

    x, w = case(0, jnp.float32)[0], case(0)[1]
    text = jax.jit(step).trace(jnp.ones((7, 2)), w, x).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all(line.endswith("xf32>") for line in products)  # those of the adapter have float32 operands
    assert sum("xbf16>, tensor" in line for line in products) == 2
