"""Every adapter on a base in codes, scanned and split over eight devices, against the same one on the codes' values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import sharding, tree
from lowrank.core.errors import UserError
from lowrank.core.weight import declared_mask, dot, materialize
from lowrank.weights import lora, mixture, smore
from lowrank.weights.quantized.schemes import SCHEMES
from tests.support.close import assert_close
from tests.support.thinning import keep
from tests.support.weight_forms import FORMS, IN, L, kernel, shaken

ROWS, T = 8, 5


def gated(key, w):
    made = lora.attach_equal_ranks(key, w, rank=2, alpha=3.0)
    gate = jax.random.uniform(key, (L, ROWS, 1))
    return mixture.Gated(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)}, gate=gate)


ROUTED = {
    "mixture": lambda key, w: mixture.attach(key, w, rank=2, experts=3, alpha=3.0, per_token=2),
    "smore": lambda key, w: smore.attach(
        key, w, rank=2, experts=(3, 2), fanout=(2, 1), gate=4, scale=1.0, activation="tanh"
    ),
    "gated": gated,
}
ADAPTERS = {
    name: FORMS[name]
    for name in (
        *("lora ranks by layer", "lora_xs", "edora", "adalora", "dora", "sparse", "ia3 out", "ia3 in", "ia3 of dora"),
        *("loha", "lokr both decomposed", "hira", "vera", "oft", "boft"),
    )
} | ROUTED


def on(base, w):
    """The form `w`, with `base` in place of the kernel that all of it is on."""
    return dataclasses.replace(w, base=on(base, w.base)) if hasattr(w, "base") else base


def gradients(w, x, mesh):
    """`(sum, gradients of what is trained and of x)` of a scan over the stack, on the mesh."""
    params = {"layers": {"attn": {"q": {"kernel": w}}}}
    params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    trained, frozen = tree.split(params, declared_mask(params))
    x = sharding.make_global_batch({"x": x}, mesh)["x"]

    @jax.jit
    def both(trained, frozen, x):
        def loss(trained, x):
            w = tree.join(trained, frozen)["layers"]["attn"]["q"]["kernel"]
            return jnp.sum(jnp.sin(jax.lax.scan(lambda _, w: (None, dot(x, w)), None, w)[1]))

        return jax.value_and_grad(loss, argnums=(0, 1))(trained, x)

    return both(trained, frozen, x)


@pytest.fixture(scope="module")
def codes():
    return jax.jit(SCHEMES["nf4"](block=8))(kernel(True))


@pytest.mark.parametrize("name", keep(ADAPTERS, ("lora ranks by layer", "dora", "sparse", "vera", "oft", "mixture")))
def test_an_adapter_on_codes_on_a_mesh_is_the_one_on_their_values(name, codes):
    w = shaken(ADAPTERS[name](jax.random.key(1), materialize(codes)), jax.random.key(3))
    assert jax.tree.structure(ADAPTERS[name](jax.random.key(1), codes)) == jax.tree.structure(on(codes, w))
    x = np.random.default_rng(0).standard_normal((ROWS, T, IN)).astype(np.float32)
    got = gradients(on(codes, w), x, sharding.make_mesh(2, 2, 2))
    want = gradients(w, x, sharding.make_mesh(1, 1, 1))
    assert_close(got, want, relative=2e-5, size=max(np.abs(x).max() for x in jax.tree.leaves(want)))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_decomposes_a_kernel_says_that_codes_are_none(name, codes):
    with pytest.raises(UserError, match="decomposes a plain kernel"):
        FORMS[name](jax.random.key(1), codes)
