"""The table of forms: what is listed here is held to every law in `tests/test_laws.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.weights import (
    adalora,
    dora,
    hira,
    ir_qlora,
    loftq,
    loha,
    lokr,
    lora,
    lora_xs,
    oft,
    qa_lora,
    scaled,
    sparse,
    token_embeddings,
    vera,
)
from lowrank.weights.quantized import black_box, fake_quantized, input_scaled, mixed
from lowrank.weights.quantized.schemes import SCHEMES

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
    "lora_xs of ia3": lambda key, w: lora_xs.attach(lora_on(key, scaled.attach(w, "out"), _even(w))),
    "edora": lambda key, w: lora_xs.attach_edora(lora_on(key, w, _even(w))),
    "adalora": lambda key, w: adalora.attach(key, w, rank=RANK, alpha=6.0),
    "sparse": lambda key, w: sparse.attach(w, sparse.top_indices(jax.random.uniform(key, w.shape), 7)),
    "sparse with free slots": lambda key, w: sparse.attach(
        w, sparse.top_indices(jax.random.uniform(key, w.shape), 7).at[..., 4:].set(w.shape[-2] * w.shape[-1])
    ),
    "rows": lambda key, w: token_embeddings.attach(w, jnp.broadcast_to(jnp.array([7, 2]), (*w.shape[:-2], 2))),
    "dora": lambda key, w: dora.attach(lora_on(key, w, _even(w))),
    "ia3 out": lambda key, w: scaled.attach(w, "out"),
    "ia3 in": lambda key, w: scaled.attach(w, "in"),
    "loha": lambda key, w: loha.attach(key, w, **ranked(w)),
    "loha by rank-r^2 factors": lambda key, w: loha.attach(key, w, **ranked(w, (2, 1, 0))),
    "lokr": lambda key, w: lokr.attach(key, w, **ranked(w)),
    "lokr decomposed": lambda key, w: lokr.attach(key, w, **ranked(w, (1, 1, 0)), factor=2),
    "lokr both decomposed": lambda key, w: lokr.attach(key, w, **ranked(w, (1, 1, 0)), both=True),
    "hira": lambda key, w: hira.attach(key, w, ranks=_ranks(w)),
    "hira of ia3": lambda key, w: hira.attach(key, scaled.attach(w, "out"), ranks=_even(w)),
    "vera": lambda key, w: vera.with_projections(
        vera.attach(w, 2 * RANK, 0.1), **vera.random_projections(key, 2 * RANK, IN + 3, OUT + 5)
    ),
    "oft": lambda key, w: oft.attach(w, block=4),
    "oft one block for all": lambda key, w: oft.attach(w, block=3, share=True),
    "oft by a series": lambda key, w: oft.attach(w, block=4, terms=5),
    "boft": lambda key, w: oft.attach_butterfly(w, block=2, factors=2),
    "lora of ia3": lambda key, w: lora_on(key, scaled.attach(w, "out"), _even(w)),
    "ia3 of dora": lambda key, w: scaled.attach(dora.attach(lora_on(key, w, _even(w))), "in"),
}


def quantized(scheme: str, **options: Any) -> Callable[[jax.Array, Any], Any]:
    """The maker of a quantized form, with blocks that divide no kernel here unless `options` say otherwise."""
    return lambda key, w: SCHEMES[scheme](**options)(w)


def _on_nf4(adapt: Callable[[jax.Array, Any], Any]) -> Callable[[jax.Array, Any], Any]:
    return lambda key, w: adapt(key, SCHEMES["nf4"](block=8, double=True)(w))


# Forms that round: the largest relative error (Frobenius) of the kernel that they are made from.
ROUNDED: dict[str, float] = {
    "nf4": 0.1,
    "nf4 double": 0.1,
    "fp4": 0.16,
    "int8": 0.01,
    "llm int8": 0.01,
    "int4": 0.13,
    "int4 asymmetric": 0.09,
    "integer 8": 0.01,
    "fp8 e4m3": 0.04,
    "fp8 e5m2": 0.07,
    "ternary": 0.6,
    "mixed": 0.25,
    "awq": 0.13,
    "loftq": 0.06,
    "qa lora": 0.1,
    "ir qlora": 0.1,
    "black box": 0.01,
    "qat": 0.13,
    "lora of nf4": 0.1,
    "dora of nf4": 0.1,
    "hira of nf4": 0.1,
    "oft of nf4": 0.1,
}
FORMS |= {
    "nf4": quantized("nf4"),
    "nf4 double": quantized("nf4", block=8, double=True),
    "fp4": quantized("fp4", block=4),
    "int8": quantized("int8"),
    "llm int8": quantized("llm_int8", outliers=3),
    "int4": quantized("int4", block=8),
    "int4 asymmetric": quantized("int4", block=4, symmetric=False),
    "integer 8": quantized("integer", bits=8, block=0),
    "fp8 e4m3": quantized("fp8"),
    "fp8 e5m2": quantized("fp8", format="e5m2"),
    "ternary": quantized("ternary"),
    "mixed": lambda key, w: mixed.quantize(w, high=2, block=4, double=True),
    "awq": lambda key, w: input_scaled.scale_inputs(
        w, jnp.broadcast_to(jnp.linspace(0.5, 2, IN), w.shape[:-1]), SCHEMES["int4"](block=4, symmetric=False)
    ),
    "loftq": lambda key, w: loftq.attach(
        w, rank=RANK, scale=1.5, steps=2, dropout=0.0, quantize=SCHEMES["nf4"](block=8)
    ),
    "qa lora": lambda key, w: qa_lora.attach(
        key, w, rank=2, alpha=3.0, block=8, quantize=SCHEMES["int4"](block=8, symmetric=False)
    ),
    "ir qlora": lambda key, w: ir_qlora.attach(
        FORMS["lora"](key, SCHEMES["nf4"](block=8, double=True, calibrate=5)(w))
    ),
    "black box": lambda key, w: black_box.attach(w, black_box.absmax, "absmax"),
    "qat": lambda key, w: fake_quantized.attach(w, scheme="int4", options=(("block", 8),), activations=0),
    "lora of nf4": _on_nf4(FORMS["lora"]),
    "dora of nf4": _on_nf4(FORMS["dora"]),
    "hira of nf4": _on_nf4(FORMS["hira"]),
    "oft of nf4": _on_nf4(FORMS["oft"]),
}


# How many times the product of a form is rounded in half precision, besides the last time, as its docstrings say: once
# for each kernel that is formed or decoded, for each factor of a rotation and its result, and for scaled inputs. The
# roundings of an update's factors count where the update is as large as the output. Others: 0.
ROUNDINGS: dict[str, int] = {
    **dict.fromkeys(ROUNDED, 1),
    **dict.fromkeys(("sparse", "rows", "hira"), 1),
    **dict.fromkeys(("oft", "oft one block for all", "oft by a series"), 2),
    **dict.fromkeys(("awq", "hira of nf4", "hira of ia3"), 2),
    **dict.fromkeys(("pissa", "olora", "lora_xs", "lora_xs ranks by layer", "lora_xs of ia3", "edora"), 6),
    "oft of nf4": 3,
    "boft": 4,
}

# Forms that differ from another one in an option, or are two of the others in one: their laws are in `make test-all`.
VARIANTS = (
    *("rslora gaussian", "lora zero A", "olora", "lora_xs ranks by layer", "lora_xs of ia3", "hira of ia3"),
    *("lora of ia3", "loha by rank-r^2 factors", "lokr decomposed", "oft one block for all", "oft by a series"),
    *("nf4 double", "fp4", "int4", "integer 8", "fp8 e5m2", "dora of nf4", "hira of nf4", "oft of nf4"),
)


def kernel(stacked: bool) -> jax.Array:
    """A random base kernel."""
    return jax.random.normal(jax.random.key(0), (L, IN, OUT) if stacked else (IN, OUT))


def shaken(w: Any, key: jax.Array, size: float = 0.3) -> Any:
    """The form after some training: every declared trainable leaf moved by about `size`, padding left alone."""
    moved = {}
    for field in dataclasses.fields(w) if dataclasses.is_dataclass(w) else ():
        value, field_key = getattr(w, field.name), jax.random.fold_in(key, len(moved))
        if dataclasses.is_dataclass(value):
            moved[field.name] = shaken(value, field_key, size)
        elif field.metadata.get("trainable") and value is not None:
            moved[field.name] = _moved(w, field.name, value, field_key, size)
    return dataclasses.replace(w, **moved) if moved else w


PAIRS = (("a", "b"), ("a1", "b1"), ("a2", "b2"))  # factors whose ranks may be padded


def _moved(w: Any, name: str, value: Any, key: jax.Array, size: float) -> Any:
    if isinstance(value, tuple):
        return tuple(x + size * jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(value))
    noise = size * jax.random.normal(key, value.shape)
    pair = next((pair for pair in PAIRS if name in pair and hasattr(w, pair[0])), None)
    if not pair:
        return value + noise
    live = jnp.any(getattr(w, pair[0]) != 0, axis=-2) | jnp.any(getattr(w, pair[1]) != 0, axis=-1)  # [..., r]
    return value + noise * (live[..., None, :] if name == pair[0] else live[..., :, None])
