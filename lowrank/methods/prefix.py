"""Prefix tuning as a method: learned keys and values in every layer."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import SHARED, Export, Method
from lowrank.methods.options import check_unused


def prefix(length: int = 20, reparam: bool = False, hidden: int = 512) -> Method:
    """Prefix tuning: learned keys and values before those of the text (Li & Liang 2021, arXiv:2101.00190).

    `[L, length, W]`, where W is key heads times head width; every token of a layer attends to them. With `reparam`,
    the MLP of the paper computes them in training from an embedding `E [length, W]`: `tanh(E @ in + b) @ out + b'`,
    `in` `[W, hidden]`, `out` `[hidden, 2 L W]`. A row of the output holds the keys of layer l at 2l and its values at
    2l + 1. An adapter saves the keys and values, not the MLP.

    Differs from the paper: the keys and values are learned as they are by default, where the paper always trains the
    MLP; they start at random, where it also starts them from the activations of words.
    """
    targets.check_positive(length=length, hidden=hidden)
    model = {"prefix_length": length}
    if not reparam:
        check_unused(prefix, "method.reparam=true", hidden=hidden)
        return Method(model_options=model, trainable=("prefix/(k|v)",))
    return Method(
        model_options=model,
        trainable=(rf"{SHARED}/prefix/.*",),
        init_shared=lambda params, key: {"prefix": _mlp(params["prefix"]["k"].shape, hidden, key)},
        bind=bind_prefix,
        export=Export(frozen=("prefix/(k|v)",), bound=True),
    )


def _mlp(shape_LxPxW: tuple[int, int, int], hidden: int, key: jax.Array) -> PyTree:
    L, P, W = shape_LxPxW
    keys = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(keys[0], (P, W)),
        "in": _linear(keys[1], W, hidden),
        "out": _linear(keys[2], hidden, 2 * L * W),
    }


def _linear(key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
    kernel = jax.random.uniform(key, (n_in, n_out), minval=-(n_in**-0.5), maxval=n_in**-0.5)
    return {"kernel": kernel, "bias": jnp.zeros(n_out)}


def bind_prefix(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
    """`params` with the prefix that the MLP computes; `params` of a loaded adapter have no MLP and stay as they are."""
    del batch, rng
    if SHARED not in params:
        return params
    mlp, (L, P, W) = params[SHARED]["prefix"], params["prefix"]["k"].shape
    flat = _affine(jnp.tanh(_affine(mlp["embedding"], mlp["in"])), mlp["out"])
    k_v_LxPxW = jnp.moveaxis(flat.reshape(P, L, 2, W), (2, 1), (0, 1))
    return {**params, "prefix": {"k": k_v_LxPxW[0], "v": k_v_LxPxW[1]}}


def _affine(x: jax.Array, linear: PyTree) -> jax.Array:
    return x @ linear["kernel"] + linear["bias"][None]
