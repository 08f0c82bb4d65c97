"""Adapters in and out of the Hugging Face PEFT format: `adapter_config.json` and `adapter_model.safetensors`.

What can be held of rewritten weights is a table, `forms.FORMS`; prompts and prefixes are `prompts`, rows `tokens`.
Reading is strict where PEFT only warns: every tensor that the JSON calls for must be there in its shape, and no other.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from lowrank.adapters.peft import config, experts, prompts, reading, tensors, tokens, writing
from lowrank.adapters.peft.forms import FORMS
from lowrank.adapters.peft.modules import Base
from lowrank.adapters.peft.reading import About
from lowrank.core import files
from lowrank.core.typing import PyTree

WHOLE: dict[str, ModuleType] = {
    **dict.fromkeys(prompts.OPTIONS, prompts),
    tokens.TYPE: tokens,
}  # what is not said module by module


def about(directory: str | os.PathLike[str]) -> About:
    """Reads what the adapter in `directory` is for, without its tensors. Raises UserError as `load` does."""
    raw = config.parse(directory)
    if raw["peft_type"] not in WHOLE:
        return reading.about(directory)
    options = WHOLE[raw["peft_type"]].model_options(raw, tensors.shapes(directory))
    return About(raw["peft_type"], raw.get("base_model_name_or_path"), options)


def load(directory: str | os.PathLike[str], params: PyTree, base: Base, *, any_base: bool = False) -> PyTree:
    """`params`, the plain tree of `base`, with the adapter in `directory` attached.

    Raises:
      UserError: naming the culprit, for an unknown `peft_type`, JSON keys that would change the maths unseen, another
        base (by its recorded name, unless `any_base`; by its shapes), and tensors that are missing, unexpected,
        misshapen or not finite.
    """
    raw = config.parse(directory)
    if raw["peft_type"] in WHOLE:
        return WHOLE[raw["peft_type"]].load(directory, params, base, any_base=any_base)
    settings, form = config.read(directory)
    config.check_base(settings, base.name, directory, any_base)
    rows, found = tokens.beside(settings, tensors.read(directory), params, base, directory)
    module = experts if settings.get(experts.KEY) else reading
    return tokens.placed(rows, module.attach(settings, form, found, params, base, directory))


def fits(params: PyTree) -> bool:
    """Whether `params` hold something that this format may have a place for, beside rewritten weights."""
    return any(module.fits(params) for module in (experts, *WHOLE.values()))


def save(
    params: PyTree,
    base: Base,
    directory: str | os.PathLike[str],
    *,
    trained: Iterable[str] = (),
    method: Mapping[str, Any] | None = None,
    original: PyTree | None = None,
) -> Path:
    """Writes the adapter in `params`, the adapted tree of `base`, and returns its folder. Every process must call it.

    Args:
      trained: names of all trained leaves; those beside the forms' own are written too (biases, a classifier's head).
      method: the config group of the method; `rslora` says how scales are written as alphas.
      original: the parameters before the method was attached. PiSSA and OLoRA need them: their base is a residual, so
        that their update of rank r is one of rank 2r to the original.

    Raises:
      UserError: for a form, or a trained leaf, that the format cannot hold, and for PiSSA or OLoRA without `original`.
    """
    rows, params, trained = tokens.set_aside(params, trained)
    module = next((module for module in (experts, *WHOLE.values()) if module.fits(params)), writing)
    summary, arrays = module.content(params, base, trained, dict(method or {}), original)
    summary, arrays = tokens.added(rows, base, summary, arrays)
    if jax.process_index() == 0:
        tensors.write(directory, arrays)
        files.write_json(Path(directory) / config.NAME, dict(sorted(summary.items())))
    return Path(directory)


__all__ = ["FORMS", "About", "about", "fits", "load", "save"]
