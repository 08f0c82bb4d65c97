"""LoftQ as a method: LoRA on codes that are computed together with it."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.methods import targets
from lowrank.methods.lora import bind_dropout
from lowrank.methods.method import Export, Method
from lowrank.methods.quantized_base import LINEAR, check_plain, quantizer
from lowrank.weights import loftq as form


def loftq(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    quantize: Mapping[str, Any] | str = "nf4",
    steps: int = 1,
    dropout: float = 0.0,
) -> Method:
    """LoftQ: LoRA on codes, both computed so that their sum starts near W; see `lowrank.weights.loftq`.

    `quantize` is a scheme `{"name": "nf4", "block": 64, ...}` or its name. `steps` is the number of alternations
    between codes and factors. The base must not be in codes: with `model.quantize` the rounding error is unknown.
    """
    targets.check_positive(rank=rank, alpha=alpha, steps=steps)
    targets.check_fraction(dropout=dropout)
    make = quantizer(quantize)

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        del key
        targets.check_rank(name, w.shape, rank)
        check_plain("LoftQ", name, w)
        return form.attach(w, rank=rank, scale=alpha / rank, steps=steps, dropout=dropout, quantize=make)

    # After several steps the codes depend on the last bits of a decomposition, so the adapter saves them.
    codes = (rf"{target}/base/.*",) if steps > 1 else ()
    return Method(rules=((target, adapt),), bind=bind_dropout if dropout else None, export=Export(frozen=codes))
