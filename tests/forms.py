"""The table of forms: what is listed here is held to every law in `tests/test_laws.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.weights import dora, lora, lora_xs, scaled

L, IN, OUT, RANK = 3, 12, 10, 4


def lora_on(key: jax.Array, w: Any, ranks: tuple[int, ...] = (RANK,), **options: Any) -> lora.LoRA:
    """A LoRA on one kernel `[in, out]` or, with a rank for each layer, on a stack of them."""
    settings = {"rslora": False, "dropout": 0.0, "init": "kaiming", **options}
    return lora.attach(key, w, ranks=ranks, alphas=[6.0] * len(ranks), **settings)


def _ranks(w: Any) -> tuple[int, ...]:
    return (RANK, 1, 0)[: w.shape[0]] if len(w.shape) == 3 else (RANK,)


def _even(w: Any) -> tuple[int, ...]:
    return (RANK,) * (w.shape[0] if len(w.shape) == 3 else 1)


FORMS: dict[str, Callable[[jax.Array, Any], Any]] = {
    "array": lambda key, w: w,
    "lora": lambda key, w: lora_on(key, w, _even(w)),
    "lora ranks by layer": lambda key, w: lora_on(key, w, _ranks(w)),
    "rslora gaussian": lambda key, w: lora_on(key, w, _even(w), rslora=True, init="gaussian"),
    "lora zero A": lambda key, w: lora_on(key, w, _even(w), init="zero_a"),
    "pissa": lambda key, w: lora_on(key, w, _even(w), init="pissa"),
    "olora": lambda key, w: lora_on(key, w, _even(w), init="olora"),
    "lora_xs": lambda key, w: lora_xs.attach(lora_on(key, w, _even(w))),
    "lora_xs ranks by layer": lambda key, w: lora_xs.attach(lora_on(key, w, _ranks(w))),
    "edora": lambda key, w: lora_xs.attach_edora(lora_on(key, w, _even(w))),
    "dora": lambda key, w: dora.attach(lora_on(key, w, _even(w))),
    "ia3 out": lambda key, w: scaled.attach(w, "out"),
    "ia3 in": lambda key, w: scaled.attach(w, "in"),
    "lora of ia3": lambda key, w: lora_on(key, scaled.attach(w, "out"), _even(w)),
    "ia3 of dora": lambda key, w: scaled.attach(dora.attach(lora_on(key, w, _even(w))), "in"),
}


def kernel(stacked: bool) -> jax.Array:
    """A random base kernel."""
    return jax.random.normal(jax.random.key(0), (L, IN, OUT) if stacked else (IN, OUT))


def shaken(w: Any, key: jax.Array) -> Any:
    """The form after some training: every declared trainable leaf moved, padding left alone."""
    moved = {}
    for field in dataclasses.fields(w) if dataclasses.is_dataclass(w) else ():
        value, field_key = getattr(w, field.name), jax.random.fold_in(key, len(moved))
        if dataclasses.is_dataclass(value):
            moved[field.name] = shaken(value, field_key)
        elif field.metadata.get("trainable"):
            moved[field.name] = _moved(w, field.name, value, field_key)
    return dataclasses.replace(w, **moved) if moved else w


def _moved(w: Any, name: str, value: jax.Array, key: jax.Array) -> jax.Array:
    noise = 0.3 * jax.random.normal(key, value.shape)
    if name not in ("a", "b"):
        return value + noise
    live = jnp.any(w.a != 0, axis=-2) | jnp.any(w.b != 0, axis=-1)  # [..., r]
    return value + noise * (live[..., None, :] if name == "a" else live[..., :, None])
