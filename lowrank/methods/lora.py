"""LoRA as a method: the targeted weights, the rank and alpha of each layer, and the biases that are trained too."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import Hooks, Method
from lowrank.weights import lora as form


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = r".*attn/(q|v|qkv)/kernel",
    rslora: bool = False,
    dropout: float = 0.0,
    bias: str = "none",
    init: str = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoRA on the weights that `target` matches; see `lowrank.weights.lora` for the formula and the inits.

    `rslora` scales by alpha / sqrt(rank). `bias` trains no biases (`none`), `all` of them, or those of the targets
    (`lora_only`). The patterns map a regex over names, with or without the index of a layer (`layers/attn/q/kernel`,
    `layers/3/attn/q/kernel`), to a rank or an alpha. The last match wins, and rank 0 leaves a layer without a LoRA.
    The target may be the embedding (`embed/embedding`) too, and with it a head that shares it; there `init=kaiming` is
    `init=zero_a`, as in PEFT: A starts at zero, and B is normal.

    Differs from the paper: A starts Kaiming uniform, as in the authors' code, where the paper draws it from a normal
    distribution (`init=gaussian`).
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    targets.check_ranks(rank, alpha, rank_pattern, alpha_pattern)
    targets.check_fraction(dropout=dropout)
    biases = {"none": (), "all": (r"(.*/)?bias",), "lora_only": (re.sub(r"kernel$", "bias", target),)}
    if bias not in biases:
        raise unknown("LoRA bias", bias, biases)
    if init not in form.INITS:
        raise unknown("LoRA init", init, form.INITS)

    def adapt(key: jax.Array, w: Any, name: str) -> form.LoRA:
        ranks = targets.ranks(name, w.shape, rank, rank_pattern, tables=True)
        alphas = targets.per_layer(name, w.shape, alpha, alpha_pattern)
        if name == targets.TABLE and init in form.RESIDUAL:
            raise UserError(f"init={init} decomposes a kernel, and {name} is an embedding: leave it out of the target")
        # A Kaiming uniform A has entries of 1 / sqrt(vocab), through which the gradient of B would be too small.
        start = "zero_a" if name == targets.TABLE and init == "kaiming" else init
        return form.attach(key, w, ranks=ranks, alphas=alphas, rslora=rslora, dropout=dropout, init=start)

    return Method(
        rules=((target, adapt),),
        trainable=biases[bias],
        bind=bind_dropout if dropout else None,
        hooks=Hooks(by_layer=tuple((target, p) for p in (*rank_pattern, *alpha_pattern))),
    )


def bind_dropout(params: PyTree, batch: Any, rng: jax.Array | None) -> PyTree:
    """Gives every weight with dropout its key for this step, one per layer; without an `rng` there is no dropout."""
    del batch
    if rng is None:
        return params

    def bound(name: str, w: Any) -> Any:
        if not getattr(w, "dropout", 0):
            return w
        key = weight.name_key(rng, name)
        stack = w.shape[:-2]
        return dataclasses.replace(w, key=jax.random.split(key, stack) if stack else key)

    return tree.map_named(bound, params, is_leaf=weight.is_weight)
