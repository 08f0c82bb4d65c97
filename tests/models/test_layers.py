import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import weight
from lowrank.models.layers import MLP, Head, Linear, Norm
from lowrank.models.rope import RopeScaling, apply_rope, rope_frequencies, rope_tables
from tests.support.close import assert_close
from tests.support.float64 import in_float64
from tests.support.weight_forms import FORMS, IN, OUT, ROUNDED, kernel, shaken


def test_a_linear_refuses_a_kernel_of_another_shape():
    with pytest.raises(ValueError, match=r"kernel has shape \(3, 5\), the model needs \(4, 5\)"):
        Linear(5).apply({"params": {"kernel": jnp.ones((3, 5))}}, jnp.ones((2, 4)))


@pytest.mark.parametrize("name", ["array", "lora", "ia3 out", "nf4"])
def test_the_logits_of_a_bfloat16_head_are_not_rounded_whatever_its_form(name):
    w = shaken(FORMS[name](jax.random.key(1), kernel(False).astype(jnp.bfloat16)), jax.random.key(3), 0.1)
    x = jax.random.normal(jax.random.key(5), (100, IN), jnp.bfloat16)
    logits = Head(OUT).apply({"params": {"kernel": w}}, x)
    decoded = weight.materialize(w) if name in ROUNDED else w  # in the dtype in which it is multiplied
    exact = in_float64(lambda x, w: x @ weight.materialize(w), x, decoded)
    error = lambda y: np.linalg.norm(np.float64(y) - exact)  # noqa: E731
    assert logits.dtype == jnp.float32
    assert error(logits) < 0.5 * error(jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_computes_in_float32_whatever_its_input(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 7, 64)) * 5 + 2, jnp.bfloat16)
    params = {"scale": rng.standard_normal(64).astype(np.float32), "bias": rng.standard_normal(64).astype(np.float32)}
    y = Norm(kind, 1e-5, 1.0).apply({"params": params}, x)
    x64 = np.asarray(x, np.float64)
    x64 = x64 - x64.mean(-1, keepdims=True) if kind == "layer" else x64
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * (params["scale"] + 1.0)
    want = want + params["bias"] if kind == "layer" else want
    assert y.dtype == jnp.bfloat16
    assert_close(np.asarray(y, np.float64), want, relative=0.02)


def test_a_gated_mlp_multiplies_the_gate_into_the_hidden_layer():
    x = np.random.default_rng(0).standard_normal((1, 2, 4)).astype(np.float32)
    model = MLP(6, "silu", gated=True)
    params = model.init(jax.random.key(0), x)["params"]
    gate, up, down = (np.asarray(params[n]["kernel"], np.float64) for n in ("gate", "up", "down"))
    want = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    assert_close(model.apply({"params": params}, x), want)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    near, far = np.array([[5, 3]]), np.array([[25, 23]])

    def score(positions):
        cos, sin = rope_tables(positions, rope_frequencies(8, 100.0))
        return jnp.vdot(apply_rope(q, cos[:, :1], sin[:, :1]), apply_rope(k, cos[:, 1:], sin[:, 1:]))

    assert_close(score(near), score(far))
    assert abs(score(near) - score(np.array([[5, 4]]))) > 1e-2


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    plain = rope_frequencies(64, 500000.0)
    scaled = rope_frequencies(64, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    ratio, turns = plain / scaled, 8192 * plain / (2 * np.pi)
    assert_close(ratio[turns > 4], 1)
    assert_close(ratio[turns < 1], 8)
    between = ratio[(turns >= 1) & (turns <= 4)]
    assert len(between) > 0
    assert np.all(np.diff(between) > 0)
