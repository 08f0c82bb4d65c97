"""Inits that changed the base by what the adapter alone does not say: randomized PiSSA, LoftQ, CorDA and LoRA-GA.

Their base is W less the update of the initial adapter, so that an adapter whose folder holds the initial one is a plain
LoRA of twice the rank: `[A, A0]` and `[B, -B0]`, as PEFT converts it. LoftQ quantizes its base, which has to be there.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank.adapters.peft import tensors
from lowrank.adapters.peft.forms.lora import CHANGED
from lowrank.core import paths
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.pretrained.hf_files import INDEX, SINGLE

KEY = "init_lora_weights"
RANDOMIZED, *_ = CHANGED
QUANTIZED = "loftq"
# The folders inside an adapter's in which PEFT's guides save the initial adapter and the base that remains.
INITIAL = ("pissa_init", "corda_init", "lora_ga_init", "initial_adapter")
RESIDUAL_BASE = (".", "residual_base", "residual_model")


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with one name for the randomized PiSSA of any number of iterations."""
    found = config.get(KEY)
    randomized = isinstance(found, str) and re.fullmatch(r"pissa_niter_\d+", found)
    return {**config, KEY: RANDOMIZED} if randomized else dict(config)


def residual_base(config: Mapping[str, Any], directory: PathLike) -> str | None:
    """The folder of the changed base inside the adapter's, if the init is one of CHANGED and the base is there."""
    if config.get(KEY) not in CHANGED or paths.in_bucket(directory):
        return None
    folders = [as_path(directory) / name for name in RESIDUAL_BASE]
    return next((str(f) for f in folders if (f / "config.json").exists() and _has_tensors(f)), None)


def _has_tensors(folder: AnyPath) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def as_plain_lora(
    config: Mapping[str, Any], found: Mapping[str, np.ndarray], directory: PathLike, base: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`(config, tensors)` of the same update as a plain LoRA on the base in the folder `base`.

    Unchanged for other inits. Raises UserError where neither the changed base nor the initial adapter is in the folder.
    """
    init, config = config.get(KEY), dict(config)
    if init not in CHANGED:
        return config, dict(found)
    if base and residual_base(config, directory) == base:
        return {**config, KEY: True}, dict(found)
    folders = [as_path(directory) / name for name in INITIAL]
    initial = next((folder for folder in folders if paths.exists(folder / tensors.NAME)), None)
    if init == QUANTIZED or initial is None or config.get("use_dora") or config.get("target_parameters"):
        raise UserError(f"the adapter in {directory} has {KEY}={init}, which changed its base: {_advice(init)}")
    start = tensors.read_tensors(initial)
    pairs = {key: x for key, x in found.items() if ".lora_A." in key or ".lora_B." in key}
    tensors.check_shapes(
        initial, {key: start[key] for key in start if key in pairs}, {k: x.shape for k, x in pairs.items()}
    )
    joined = {key: _joined(key, x, start[key]) for key, x in pairs.items()}
    return _doubled(config), {**found, **joined}


def _joined(key: str, trained: np.ndarray, start: np.ndarray) -> np.ndarray:
    """`[A, A0]` along the ranks, or `[B, -B0]`."""
    if ".lora_A." in key:
        return np.concatenate([trained, start], axis=0)
    return np.concatenate([trained, -start], axis=1)


def _advice(init: str) -> str:
    base = f"save that base and its tokenizer in {RESIDUAL_BASE[1]} inside the folder"
    if init == QUANTIZED:
        return f"{base} (model.unload().save_pretrained), or merge it in peft"
    convert = "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)"
    return f"convert it in peft by {convert}, or put the initial adapter in {INITIAL[-1]}, or {base}"


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """Twice the ranks with the same scales."""
    more = 2**0.5 if config["use_rslora"] else 2
    scaled = {
        "r": _times(2, config["r"]),
        "lora_alpha": _times(more, config["lora_alpha"]),
        "rank_pattern": {key: _times(2, rank) for key, rank in (config["rank_pattern"] or {}).items()},
        "alpha_pattern": {key: _times(more, alpha) for key, alpha in (config["alpha_pattern"] or {}).items()},
    }
    return {**config, **scaled, KEY: True}


def _times(factor: float, value: Any) -> Any:
    """The product; what is no number is refused where it is used."""
    return factor * value if isinstance(value, int | float) and not isinstance(value, bool) else value
