"""The product with a kernel in four bits against float64, in plain JAX and in Pallas's interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.kernels import dispatch
from lowrank.kernels.four_bit_matmul import gpu
from lowrank.kernels.four_bit_matmul.dispatch import four_bit_matmul
from lowrank.weights.quantized import ggml
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close
from tests.support.gpu_interpreter import interpreted

BF16 = jnp.bfloat16
TOLERANCES = {jnp.float32: 5e-6, BF16: 1e-2, jnp.float16: 2e-3}


def case(scheme, rows, shape, dtype, **options):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, shape[0]), shape))
    return x, SCHEMES[scheme](**options)(w)


def multiply(x, w, implementation, out=None):
    return w.dot_in(x, out or x.dtype, implementation)


def exact(x, w):
    return np.float64(x) @ np.float64(w.materialize())


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "dtype", "options"),
    [
        ("nf4", 3, (200, 130), jnp.float32, {"block": 64, "double": True}),
        ("int4", 64, (1088, 520), BF16, {"block": 64}),
        ("nf4", 1, (64, 1), BF16, {"block": 16}),
        ("int4", 17, (100, 7), jnp.float16, {"block": 128}),
        ("fp4", 1, (1, 1), jnp.float16, {"block": 16}),
    ],
)
def test_rows_meet_the_decoded_kernel(implementation, scheme, rows, shape, dtype, options):
    x, w = case(scheme, rows, shape, dtype, **options)
    y = jax.jit(multiply, static_argnums=2)(x, w, implementation)
    assert y.dtype == dtype
    assert_close(np.asarray(y, np.float64), exact(x, w), relative=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_a_product_in_float32_is_not_rounded(dtype):
    """Rows in float32 are rounded to the bfloat16 of the kernel, as in plain JAX."""
    x, w = case("nf4", 5, (200, 30), BF16)
    x = x.reshape(5, 1, 200).astype(dtype) + (1e-3 if dtype == jnp.float32 else 0)
    y = multiply(x, w, "interpret", jnp.float32)
    assert y.shape == (5, 1, 30)
    assert_close(y, exact(x.astype(BF16), w), relative=5e-6)
    assert_close(y, multiply(x, w, "xla", jnp.float32), relative=5e-6)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_nan_reaches_no_other_row_and_no_other_output(implementation):
    x, w = case("nf4", 3, (100, 7), jnp.float32)
    expected = exact(x, w)
    w = dataclasses.replace(w, scale=w.scale.at[1, 4].set(jnp.nan))
    y = np.asarray(multiply(x.at[1, 99].set(jnp.nan), w, implementation))
    others = np.ix_([0, 2], [0, 1, 2, 3, 5, 6])
    assert_close(y[others], expected[others], relative=5e-6)
    assert np.isnan(y[1]).all()
    assert np.isnan(y[:, 4]).all()


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_no_rows_have_no_products(implementation):
    x, w = case("int4", 0, (64, 8), BF16)
    assert jax.jit(multiply, static_argnums=2)(x, w, implementation).shape == (0, 8)


def test_a_kernel_of_a_gguf_file_is_decoded_in_place():
    raw = np.random.default_rng(1).integers(0, 256, (40, 4 * 18), np.uint8)
    raw[:, 1::18] = 48 | raw[:, 1::18] & 3  # of moderate scales
    w = ggml.from_file_blocks(jnp.asarray(raw), "Q4_0", "float32")
    x = case("nf4", 2, (128, 4), jnp.float32)[0]
    assert_close(multiply(x, w, "interpret"), exact(x, w), relative=5e-6)


@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "dtype", "block"),
    [
        ("nf4", 3, (200, 130), BF16, 64),
        ("nf4", 1, (64, 1), BF16, 16),
        ("int4", 64, (520, 7), jnp.float16, 256),
    ],
)
def test_the_gpu_body_meets_the_decoded_kernel(scheme, rows, shape, dtype, block):
    x, w = case(scheme, rows, shape, dtype, block=block)
    for out in (dtype, jnp.float32):
        with interpreted():
            body = functools.partial(gpu.multiply, **w.four_bits._asdict(), out=out)
            y = jax.jit(body)(x, w.codes, w.scale)
        assert y.dtype == out
        assert_close(np.asarray(y, np.float64), exact(x, w), relative=TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("scheme", "rows", "shape", "block"),
    [("nf4", 16, (4096, 14336), 64), ("int4", 64, (4096, 4096), 128), ("nf4", 1, (100, 7), 1024)],
)
def test_the_gpu_body_lowers(scheme, rows, shape, block):
    x, kernel = jax.ShapeDtypeStruct((rows, shape[0]), BF16), jax.ShapeDtypeStruct(shape, BF16)
    w = jax.eval_shape(SCHEMES[scheme](block=block), kernel)
    traced = jax.jit(multiply, static_argnums=2).trace(x, w, "pallas_gpu")
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_gradient_decodes_again():
    x, w = case("nf4", 5, (200, 30), jnp.float32)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(multiply(x, w, "interpret"))))(x)
    kernel = np.float64(w.materialize())
    assert_close(ours, np.cos(np.float64(x) @ kernel) @ kernel.T)


@pytest.mark.parametrize("rows", [8, 3])
def test_each_device_of_a_mesh_multiplies_its_own_rows(rows):
    x, w = case("int4", rows, (64, 24), jnp.float32)
    mesh = sharding.make_mesh(data=4)
    place = NamedSharding(mesh, PartitionSpec("data" if rows == 8 else None))
    y = jax.jit(multiply, static_argnums=2)(
        jax.device_put(x, place), jax.device_put(w, NamedSharding(mesh, PartitionSpec())), "interpret"
    )
    assert_close(y, exact(x, w), relative=5e-6)
    sharded = sharding.make_mesh(data=1, fsdp=4)
    with pytest.raises(UserError, match="not partitioned over a mesh of 4 devices"):
        multiply(x, jax.device_put(w, NamedSharding(sharded, PartitionSpec())), "interpret")


def lowered_for_a_tpu(monkeypatch, rows, shape, size=1, axis="data"):
    monkeypatch.setitem(dispatch.SHOWN, "TPU v6 lite", {"four_bit_matmul": "pallas_tpu"})
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((size,), (axis,), axis_types=(AxisType.Auto,), abstract_device=device)
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: case("nf4", rows, shape, BF16))
    x, w = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    plain = {"default": lambda x, w: x @ w.materialize()}
    product = jax.jit(lambda x, w: four_bit_matmul(x, w, plain))
    return product.trace(x, w).lower(lowering_platforms=("tpu",)).as_text()


def test_auto_takes_the_body_for_few_rows_that_it_does_not_pad(monkeypatch):
    taken = functools.partial(lowered_for_a_tpu, monkeypatch)
    assert "tpu_custom_call" in taken(16, (1024, 256))
    assert "tpu_custom_call" in taken(64, (1024, 256), size=4)
    assert "tpu_custom_call" not in taken(16, (1024, 256), size=4)
    assert "tpu_custom_call" not in taken(1, (1024, 256))
    assert "tpu_custom_call" not in taken(16, (1088, 256))
    assert "tpu_custom_call" not in taken(80, (1024, 256))
    assert "tpu_custom_call" not in taken(64, (1024, 256), size=4, axis="fsdp")


def test_kernels_that_a_body_cannot_take_are_refused():
    x, w = case("nf4", 2, (96, 8), jnp.float32, block=24)
    assert_close(multiply(x, w, "auto"), exact(x, w))
    with pytest.raises(UserError, match="blocks of 16 to 1024 rows that are a power of two, not 24: use 'xla'"):
        multiply(x, w, "interpret")
    with pytest.raises(UserError, match="codes of 4 bits with one scale per block, not PerChannel: use 'xla'"):
        multiply(*case("int8", 2, (96, 8), jnp.float32), "interpret")
    with pytest.raises(UserError, match="of one dtype or a float32 kernel, not float16 and bfloat16: use 'xla'"):
        multiply(x.astype(jnp.float16), w.with_dtype("bfloat16"), "interpret")


@pytest.mark.parametrize(("rows", "dtype", "why"), [(65, BF16, "a batch to 64, not 65"), (2, jnp.float32, "float32")])
def test_what_the_gpu_body_cannot_take_is_refused(rows, dtype, why):
    x, w = case("nf4", rows, (64, 8), dtype)
    with pytest.raises(UserError, match=f"{why}: use 'xla'"):
        multiply(x, w, "pallas_gpu")
