"""LoRA and DoRA in PEFT's format; LoRA-XS and EDoRA are written as LoRA and DoRA, with the core multiplied into A."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Settings
from lowrank.core.typing import HostArrays
from lowrank.weights import dora
from lowrank.weights.dora import DoRA
from lowrank.weights.lora import INITS, RESIDUAL, LoRA, require_plain_kernel
from lowrank.weights.lora_xs import EDoRA, LoRAXS

# Inits that change the base by data or at random. The first one stands for pissa_niter_4 and so on.
CHANGED = ("pissa_niter", "corda", "lora_ga", "loftq")


def _lora_settings(config: Mapping[str, Any], path: str) -> Settings:
    rank = ranked.positive_number(config, path, "rank", "r")
    alpha = ranked.positive_number(config, path, "alpha", "lora_alpha", int | float)
    scale = alpha / rank ** _power(config["use_rslora"])
    return {"r": rank, "scale": scale, "dropout": config["lora_dropout"], "init": config.get("init_lora_weights")}


def _power(rslora: bool) -> float:
    return 0.5 if rslora else 1.0


def _lora_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    rslora = bool(method.get("rslora", False))
    rank, ranks = match.split_default({path: s["r"] for path, s in modules.items()})
    alphas = {path: ranked.undo_rounding(s["scale"] * s["r"] ** _power(rslora)) for path, s in modules.items()}
    alpha, alpha_pattern = match.split_default(alphas)
    return {
        "target_modules": match.shortest_ends(modules, others),
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "lora_dropout": max(s["dropout"] for s in modules.values()),
        "init_lora_weights": True,
    }


def _peel_lora(w: LoRA, arrays: HostArrays) -> Layer | None:
    """The layer without padding: a rank that is zero in both A and B adds nothing."""
    live = ranked.nonzero_ranks(arrays, (("a", "b"),))
    settings = {"r": int(live.sum()), "scale": float(arrays["scale"]), "dropout": w.dropout}
    return Layer(settings, {"a": arrays["a"][:, live], "b": arrays["b"][live]}) if live.any() else None


def _peel_dora(w: DoRA, arrays: HostArrays) -> Layer | None:
    """The layer without padding; a layer of rank 0 is omitted if its magnitude is that of the base."""
    layer = _peel_lora(w, arrays)
    if layer is None:
        if np.allclose(arrays["magnitude"], np.sqrt(arrays["base_sq"]), rtol=1e-6, atol=0):
            return None
        zeros = {"a": arrays["a"][:, :1], "b": arrays["b"][:1]}
        layer = Layer({"r": 1, "scale": float(arrays["scale"]), "dropout": w.dropout}, zeros)
    return Layer(layer.settings, layer.arrays | {"magnitude": arrays["magnitude"]})


def _folded(to_layer: Callable[[Any, HostArrays], Layer | None]) -> Callable[[Any, HostArrays], Layer | None]:
    return lambda w, arrays: to_layer(w, {**arrays, "a": arrays["a"] @ arrays["core"]})


def _rebase_lora(layer: Layer, change: np.ndarray) -> Layer:
    """The layer on the original base: its change of rank r (PiSSA's residual) joins the update, then of rank 2r."""
    rank, scale = layer.settings["r"], layer.settings["scale"]
    u, s, v = np.linalg.svd(change / scale, full_matrices=False)
    root = np.sqrt(s[:rank])
    a = np.concatenate([layer.arrays["a"], u[:, :rank] * root], axis=1)
    b = np.concatenate([layer.arrays["b"], root[:, None] * v[:rank]], axis=0)
    return Layer({**layer.settings, "r": a.shape[1]}, {**layer.arrays, "a": a, "b": b})


def _grow_lora(base: Any, layers: Sequence[Layer | None]) -> LoRA:
    layers = [layer and _on_the_base(base, i, layer) for i, layer in enumerate(layers)]
    (n_in, n_out), present = base.shape[-2:], [layer for layer in layers if layer]
    rank = max(layer.settings["r"] for layer in present)
    return LoRA(
        base=base,
        a=ranked.stack_layers(base, layers, "a", (n_in, rank)),
        b=ranked.stack_layers(base, layers, "b", (rank, n_out)),
        scale=ranked.stack_scales(base, layers),
        dropout=present[0].settings["dropout"],
    )


def _on_the_base(base: Any, i: int, layer: Layer) -> Layer:
    """The layer on the unchanged base: the init, which PEFT subtracts from layer `i` on loading, joins the update."""
    init, shape = layer.settings["init"], base.shape[-2:]
    if init not in RESIDUAL:
        return layer
    kernel = require_plain_kernel(f"the adapter's init_lora_weights={init!r}", base).reshape(-1, *shape)[i]
    zeros = {name: jnp.zeros(x.shape) for name, x in layer.arrays.items() if name in "ab"}
    plain = LoRA(base=kernel, scale=jnp.float32(layer.settings["scale"]), **zeros)
    start = INITS[init](None, plain, np.array(zeros["a"].shape[-1:]))
    return _rebase_lora(layer, -np.asarray(start.delta()))


def _grow_dora(base: Any, layers: Sequence[Layer | None]) -> DoRA:
    w = dora.attach(_grow_lora(base, layers))
    magnitude = np.array(w.magnitude).reshape(len(layers), -1)  # layers without an adapter have the base's magnitude
    for i, layer in enumerate(layers):
        if layer:
            magnitude[i] = layer.arrays["magnitude"]
    return dataclasses.replace(w, magnitude=jnp.asarray(magnitude.reshape(w.magnitude.shape)))


_LORA_A = Part(".lora_A.weight", "a", lambda n_in, n_out, s: (s["r"], n_in), embedding=".lora_embedding_A")
_LORA_B = Part(".lora_B.weight", "b", lambda n_in, n_out, s: (n_out, s["r"]), embedding=".lora_embedding_B")
_NORMS = ".lora_magnitude_vector"
_MAGNITUDE = Part(_NORMS, "magnitude", lambda n_in, n_out, s: (n_out,), vector=True, embedding=_NORMS)

LORA = PeftForm(
    peft_type="LORA",
    kind=LoRA,
    parts=(_LORA_A, _LORA_B),
    flags={"use_dora": False},
    obeyed_keys={
        **WHERE,
        **ranked.READS,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "alpha_pattern": {},
        "bias": "none",
    },
    ignored_keys=(
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "target_parameters",  # LoRA on experts: `peft_format.experts`
        "trainable_token_indices",  # token rows beside it: `peft_format.tokens`
        "velora_config",
    ),
    # `peft_format.initial` makes a plain LoRA of those that change the base by what the adapter does not say.
    supported={"init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica", *RESIDUAL, *CHANGED)},
    settings=_lora_settings,
    to_layer=_peel_lora,
    from_layers=_grow_lora,
    summary=_lora_summary,
    extra=("scale",),
    rebase=_rebase_lora,
)

DORA = dataclasses.replace(
    LORA,
    kind=DoRA,
    parts=(_LORA_A, _LORA_B, _MAGNITUDE),
    flags={"use_dora": True},
    to_layer=_peel_dora,
    from_layers=_grow_dora,
    extra=("scale", "base_sq"),
)

# These two are only written: reading gives a LoRA or a DoRA, which does not need the singular vectors.
LORA_XS = dataclasses.replace(LORA, kind=LoRAXS, to_layer=_folded(_peel_lora), extra=("scale", "core"))
EDORA = dataclasses.replace(DORA, kind=EDoRA, to_layer=_folded(_peel_dora), extra=("scale", "base_sq", "core"))
