"""Every form's product and its gradient, compiled as users compile them, against the same formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import tree
from lowrank.core.weight import declared_mask, dot, materialize
from tests.support.close import assert_close
from tests.support.float64 import in_float64
from tests.support.weight_forms import FORMS, IN, kernel, shaken

X = np.random.default_rng(0).standard_normal((2, 5, IN)).astype(np.float32)


@pytest.mark.parametrize("name", FORMS)
def test_dot_and_its_gradient_are_those_of_float64(name):
    w = shaken(FORMS[name](jax.random.key(1), kernel(stacked=False)), jax.random.key(3))
    trained, frozen = tree.split(w, declared_mask({"kernel": w}, ["kernel"] if name == "array" else [])["kernel"])

    def value_and_gradient(multiply):
        def loss(trained, x, frozen):
            y = multiply(x, tree.join(trained, frozen))
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    (value, y), gradient = jax.jit(value_and_gradient(dot))(trained, X, frozen)
    exact = in_float64(value_and_gradient(lambda x, w: x @ materialize(w)), trained, X, frozen)
    assert_close(y, exact[0][1])
    assert_close(value, exact[0][0], size=np.sqrt(y.size))  # a sum of signs, about as large
    assert_close(gradient, exact[1], relative=2e-5)
