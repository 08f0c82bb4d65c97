"""LoftQ, QA-LoRA and quantization-aware training against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load
from lowrank.core.errors import UserError
from lowrank.core.weight import dot, materialize
from lowrank.weights.quantized import fake_quantized, lookup_tables, schemes
from lowrank.weights.quantized.packing import unpack
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close
from tests.support.weight_forms import shaken

L, IN, OUT = 2, 24, 16
Q = "layers/attn/q/kernel"
W = np.random.default_rng(0).standard_normal((L, IN, OUT)).astype(np.float32)
values, product = jax.jit(materialize), jax.jit(dot)
wave = lambda x, w: jnp.sum(jnp.sin(dot(x, w)))  # noqa: E731


def attached(kernel=W, **group):
    params = {"layers": {"attn": {"q": {"kernel": kernel}}}}
    attach = lambda p: methods.attach(methods.build_method({"target": Q, **group}), p, jax.random.key(1))  # noqa: E731
    return jax.jit(attach)(params)["layers"]["attn"]["q"]["kernel"]


def layer_of(w, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], w)


def nf4(w, block):
    """The values of NF4, in float64."""
    out, table = np.zeros(w.shape), np.float64(lookup_tables.TABLES["nf4"])
    for i in range(0, w.shape[0], block):
        top = np.abs(w[i : i + block]).max(0)
        nearest = np.abs(w[i : i + block, :, None] / top[None, :, None] - table).argmin(-1)
        out[i : i + block] = table[nearest] * top
    return out


@pytest.mark.parametrize("steps", [1, 3])
def test_loftq_alternates_codes_and_the_best_factors_with_alpha_divided_out(steps):
    rank, alpha = 3, 12.0
    w = attached(name="loftq", rank=rank, alpha=alpha, steps=steps, quantize={"name": "nf4", "block": 8})
    for layer in range(L):
        kernel, update = np.float64(W[layer]), 0.0
        for _ in range(steps):
            codes = nf4(kernel - update, 8)
            u, s, v = np.linalg.svd(kernel - codes)
            update = u[:, :rank] * s[:rank] @ v[:rank]
        one = layer_of(w, layer)
        assert_close(values(one.base), codes)
        assert_close(alpha / rank * np.float64(one.a) @ np.float64(one.b), update, relative=1e-4)
        assert_close(values(one), codes + update, relative=1e-5)


def test_loftq_starts_nearer_than_qlora():
    error = lambda w: np.linalg.norm(np.float64(values(w)) - W)  # noqa: E731
    start = error(jax.jit(schemes.SCHEMES["nf4"](block=8))(W))
    found = [error(attached(name="loftq", rank=4, steps=n, quantize={"name": "nf4", "block": 8})) for n in (1, 4)]
    assert found[1] < found[0] < 0.9 * start


def test_qa_lora_pools_its_input_and_is_absorbed_by_the_zeros():
    w = shaken(attached(name="qa_lora", rank=2, alpha=6.0, block=8), jax.random.key(2))
    one = layer_of(w, 0)
    x = np.random.default_rng(1).standard_normal((5, IN))
    pooled = x.reshape(5, IN // 8, 8).mean(-1) * 8  # the paper's average, times the group
    base = np.float64(values(one.base))
    expected = x @ base + 6.0 / 2 * pooled @ np.float64(one.a) @ np.float64(one.b)
    assert_close(product(np.float32(x), one), expected)
    merged = w.absorbed()
    np.testing.assert_array_equal(merged.codes, w.base.codes)
    assert_close(values(merged), values(w))


def test_qa_lora_takes_codes_that_are_there_if_they_have_zeros():
    codes = jax.jit(schemes.SCHEMES["int4"](block=8, symmetric=False))(W)
    w = attached(codes, name="qa_lora", rank=2, block=8)
    np.testing.assert_array_equal(w.base.codes, codes.codes)
    with pytest.raises(UserError, match=r"method.block is 4, but the base's codes have blocks of 8"):
        attached(codes, name="qa_lora", rank=2, block=4)
    with pytest.raises(UserError, match="needs asymmetric integer codes, not NF4"):
        attached(jax.jit(schemes.SCHEMES["nf4"]())(W), name="qa_lora", rank=2, block=8)


def test_calibration_finds_the_shift_whose_codes_say_most():
    # So many columns that each candidate, the first and the last too, is the best of some of them.
    kernel = np.random.default_rng(1).standard_normal((16, 100)).astype(np.float32)
    table = np.float64(lookup_tables.TABLES["nf4"])
    w = jax.jit(schemes.SCHEMES["nf4"](block=16, calibrate=10))(kernel)
    codes = np.asarray(jax.jit(unpack, static_argnums=(1, 2))(w.codes, 4, 16))[0]
    decoded, chosen = np.asarray(values(w)), np.asarray(w.shift)[0]
    for j in range(kernel.shape[1]):
        v = np.float64(kernel[:, j])
        found = {}
        for shift in np.median(v) + np.linspace(-0.1, 0.1, 21) * v.std():
            near = np.abs((v - shift)[:, None] / np.abs(v - shift).max() - table).argmin(1)
            p = np.bincount(near, minlength=16) / 16
            found[shift] = -np.sum(p[p > 0] * np.log(p[p > 0]))
        p = np.bincount(codes[:, j], minlength=16) / 16
        assert_close(-np.sum(p[p > 0] * np.log(p[p > 0])), max(found.values()))
        assert_close(chosen[j], min(found, key=lambda shift: abs(chosen[j] - shift)), size=np.abs(v).max())
        top = np.abs(v - chosen[j]).max()
        assert_close(decoded[:, j], table[codes[:, j]] * top + chosen[j])


def test_the_elastic_connection_is_the_papers():
    rank, alpha = 6, 9.0
    w = shaken(attached(name="ir_qlora", rank=rank, alpha=alpha, block=8, calibrate=3), jax.random.key(2))
    layer, x = layer_of(w, 1), np.random.default_rng(1).standard_normal((5, IN))
    one = {k: np.float64(getattr(layer, k)) for k in ("a", "b", "beta1", "beta2")}

    def averaged(x, size):  # runs of the common divisor, averaged, and repeated to the new size
        g = math.gcd(x.shape[-1], size)
        return np.tile(x.reshape(len(x), -1, g).mean(1), (1, size // g))

    inner = x @ one["a"] + one["beta1"] * averaged(x, rank)
    update = inner @ one["b"] + one["beta2"] * averaged(inner, OUT)
    expected = x @ np.float64(values(layer.base)) + alpha / rank * update
    assert_close(product(np.float32(x), layer), expected)


def halves(kernel):
    """A quantizer as a stranger may write it: each column in steps of a half of its mean magnitude."""
    step = jnp.mean(jnp.abs(kernel), axis=0) / 2
    return {"steps": jnp.round(kernel / step[None]).astype(jnp.int8), "step": step}, decoded


def decoded(state):
    return state["steps"] * state["step"][None]


def transposed(kernel):
    return kernel.T, lambda state: state


def test_modulora_takes_any_quantizer():
    w = shaken(attached(name="modulora", rank=2, alpha=4.0, quantizer=f"{__name__}:halves"), jax.random.key(2))
    assert w.shape == (L, IN, OUT)
    x, gradient = np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32), jax.jit(jax.grad(wave))
    for i in range(L):
        kernel, layer = np.float64(W[i]), layer_of(w, i)
        step = np.abs(kernel).mean(0) / 2
        expected = np.round(kernel / step) * step + 2.0 * np.float64(layer.a) @ np.float64(layer.b)
        assert_close(np.asarray(values(w))[i], expected)
        assert_close(product(x, layer), x @ expected.astype(np.float32))
        one = np.asarray(values(layer))
        assert_close(gradient(x, layer), np.cos(x @ one) @ one.T, relative=1e-5)


def test_qat_multiplies_by_the_codes_and_hands_the_gradient_through():
    w = layer_of(attached(name="qat", quantize={"name": "int4", "block": 8}), 0)
    codes = np.asarray(values(jax.jit(schemes.SCHEMES["int4"](block=8))(W[0])))
    assert_close(values(w), codes)
    x = np.random.default_rng(1).standard_normal((5, IN)).astype(np.float32)
    gradient = jax.jit(jax.grad(wave, argnums=1))(x, w).latent
    assert_close(gradient, x.T @ np.cos(x @ codes))


def test_activations_are_rounded_to_their_bits_and_the_gradient_is_not():
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    step, rounded = np.abs(x).max(-1, keepdims=True) / 7, jax.jit(lambda x: fake_quantized.round_activations(x, 4))
    found = np.asarray(rounded(x))
    assert_close(found, np.round(x / step) * step)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(rounded(x))))(x), np.ones_like(x))
    assert len(np.unique(found[0])) <= 8


def test_the_adapter_of_loftq_is_not_one_of_peft_and_comes_back(tmp_path):
    base = pretrained.load(str(tiny.llama(tmp_path / "tiny-llama")))
    group = {"name": "loftq", "rank": 2, "steps": 2, "target": ".*attn/q/kernel", "quantize": "nf4"}
    method = methods.build_method(group)
    params = jax.jit(lambda p: methods.attach(method, p, jax.random.key(0)))(base.params)
    params, mask = methods.exported_leaves(method, params, methods.trainable_mask(method, params))
    assert adapter_files.save(params, base, tmp_path / "adapter", mask=mask, method=group) == "trained leaves by name"
    loaded = load.load_adapted(tmp_path / "adapter", str(tmp_path / "tiny-llama")).params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "loftq", "quantize": "nf5"}, r"unknown method.quantize 'nf5' \(did you mean 'nf4'\?\)"),
        ({"name": "loftq", "quantize": {"name": "nf4", "bloc": 8}}, "method.quantize.bloc"),
        ({"name": "loftq", "rank": OUT + 1}, "rank 17 is larger"),
        ({"name": "loftq", "steps": 0}, "steps must be positive"),
        ({"name": "qa_lora", "block": 8, "rank": 4}, "rank 4 is larger than min"),
        ({"name": "qa_lora", "bits": 3, "rank": 1}, "must be one of 2, 4, 8"),
        (
            {"name": "modulora", "quantizer": "no.such:thing"},
            "'no.such:thing' cannot be imported as package",
        ),
        ({"name": "modulora", "quantizer": f"{__name__}:transposed"}, r"decodes a kernel \(24, 16\) to \(16, 24\)"),
        ({"name": "qat", "activations": 1}, "must be 0 or 2 to 8 bits, not 1"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(UserError, match=message):
        attached(**group)


def test_what_is_in_codes_already_is_refused_by_name():
    codes = jax.jit(schemes.SCHEMES["int8"]())(W)
    with pytest.raises(UserError, match=f"LoftQ starts from a plain kernel; {Q} is a PerChannel"):
        attached(codes, name="loftq", rank=2)


@pytest.mark.parametrize("name", ["loftq", "ir_qlora", "qa_lora", "modulora", "qat"])
def test_a_kernel_that_is_not_finite_is_named(name):
    params = {"mlp": {"kernel": np.ones((64, 32), np.float32)}}
    params["mlp"]["kernel"][3, 2] = np.nan
    options = {} if name == "qat" else {"rank": 1}
    with pytest.raises(UserError, match="mlp/kernel holds NaN or infinite"):
        methods.attach(methods.build_method({"name": name, "target": ".*kernel", **options}), params, jax.random.key(0))
