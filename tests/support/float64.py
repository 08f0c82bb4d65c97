"""Functions of the package, computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np

SINGLE_OR_HALF = (jnp.float32, jnp.bfloat16, jnp.float16)


def in_float64(function, *arguments):
    """The result of `function` with every floating-point leaf of the arguments in float64."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: np.float64(x) if x.dtype in SINGLE_OR_HALF else x, jax.device_get(arguments))
        return jax.device_get(jax.jit(function)(*double))
