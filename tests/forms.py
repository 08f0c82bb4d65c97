"""The table of forms: what is listed here is held to every law in `tests/test_laws.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.weights import dora, loha, lora, lora_xs, scaled

L, IN, OUT, RANK = 3, 12, 10, 4


def lora_on(key: jax.Array, w: Any, ranks: tuple[int, ...] = (RANK,), **options: Any) -> lora.LoRA:
    """A LoRA on one kernel `[in, out]` or, with a rank for each layer, on a stack of them."""
    settings = {"rslora": False, "dropout": 0.0, "init": "kaiming", **options}
    return lora.attach(key, w, ranks=ranks, alphas=[6.0] * len(ranks), **settings)


def ranked(w: Any, ranks: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Ranks and alphas for one kernel or, one a layer, for a stack of them."""
    ranks = _even(w) if ranks is None else ranks[: len(_even(w))]
    return {"ranks": ranks, "alphas": [6.0] * len(ranks)}


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
    "loha": lambda key, w: loha.attach(key, w, **ranked(w)),
    "loha by rank-r^2 factors": lambda key, w: loha.attach(key, w, **ranked(w, (2, 1, 0))),
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


PAIRS = (("a", "b"), ("a1", "b1"), ("a2", "b2"))  # factors whose ranks may be padded


def _moved(w: Any, name: str, value: jax.Array, key: jax.Array) -> jax.Array:
    noise = 0.3 * jax.random.normal(key, value.shape)
    pair = next((pair for pair in PAIRS if name in pair and hasattr(w, pair[0])), None)
    if not pair:
        return value + noise
    live = jnp.any(getattr(w, pair[0]) != 0, axis=-2) | jnp.any(getattr(w, pair[1]) != 0, axis=-1)  # [..., r]
    return value + noise * (live[..., None, :] if name == pair[0] else live[..., :, None])
