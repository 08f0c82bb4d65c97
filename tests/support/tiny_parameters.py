"""Parameters of a model with three layers of tiny kernels, and a method attached to them."""

import jax
import jax.numpy as jnp

from lowrank import methods
from lowrank.core import tree

L, D = 3, 8


Q = r"layers/attn/q/kernel"


def base():
    key = jax.random.key(0)
    kernel = lambda i: jax.random.normal(jax.random.fold_in(key, i), (L, D, D))  # noqa: E731
    attn = {n: {"kernel": kernel(i), "bias": jnp.zeros((L, D))} for i, n in enumerate("qkvo")}
    mlp = {"down": {"kernel": kernel(9), "bias": jnp.zeros((L, D))}}
    return {"layers": {"attn": attn, "mlp": mlp}, "head": {"kernel": kernel(10)[0]}}


def attached(**group):
    method = methods.build_method(group)
    params = methods.attach(method, base(), jax.random.key(1))
    return params, tree.leaf_names(tree.split(params, methods.trainable_mask(method, params))[0])
