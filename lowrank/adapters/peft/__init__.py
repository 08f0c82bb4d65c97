"""The Hugging Face PEFT format, in and out: `adapter_config.json` and `adapter_model.safetensors`.

The table `forms.FORMS` lists the forms of weights that the format holds; `prompts` is for prompts and prefixes,
`tokens` for token embeddings, `experts` for experts. Reading is strict where PEFT only warns: the file must hold
exactly the tensors that the JSON asks for, in their shapes.
"""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax

from lowrank.adapters.peft import (
    config,
    embeddings,
    experts,
    initial,
    prompts,
    reading,
    tensors,
    tokens,
    wrapped,
    writing,
)
from lowrank.adapters.peft.forms import FORMS
from lowrank.adapters.peft.method_group import method_group
from lowrank.adapters.peft.modules import Base, base_modules
from lowrank.adapters.peft.reading import AdapterDescription
from lowrank.core import bounded_regex, files
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.core.typing import PyTree

WHOLE_MODEL_TYPES: dict[str, ModuleType] = {
    **dict.fromkeys(prompts.OPTIONS, prompts),
    tokens.TYPE: tokens,
}  # adapters that are not a set of adapted modules


@bounded_regex.budget()
def describe_adapter(directory: PathLike) -> AdapterDescription:
    """The type of the adapter in `directory`, its base, and the model options that it needs, without its tensors.

    Raises UserError for a directory or a JSON that `load` refuses.
    """
    raw = config.parse_json(directory)
    if raw["peft_type"] not in WHOLE_MODEL_TYPES:
        return reading.describe_adapter(directory)
    options = WHOLE_MODEL_TYPES[raw["peft_type"]].model_options(raw, tensors.read_shapes(directory))
    return AdapterDescription(
        raw["peft_type"], raw.get("base_model_name_or_path"), options, raw.get("revision") or None
    )


@bounded_regex.budget()
def load(directory: PathLike, params: PyTree, base: Base, *, any_base: bool = False, rebased: bool = True) -> PyTree:
    """`params`, the plain tree of `base`, with the adapter in `directory` attached.

    The change that PiSSA's or OLoRA's init makes to the base joins the update. Where it is not `rebased`, the factors
    stay those of the file, for the caller to put on a base that the init has changed.

    Raises:
      UserError: naming the culprit, for an unknown `peft_type`, JSON keys that would change the computation, another
        base (by its recorded name, unless `any_base`; by its shapes), and tensors that are missing, unexpected,
        misshapen or not finite.
    """
    raw = config.parse_json(directory)
    if raw["peft_type"] in WHOLE_MODEL_TYPES:
        return WHOLE_MODEL_TYPES[raw["peft_type"]].load(directory, params, base, any_base=any_base)
    settings, form = config.read_config(directory)
    config.check_base(settings, base.name, directory, any_base)
    settings, found = initial.as_plain_lora(settings, tensors.read_tensors(directory), directory, _folder(base))
    settings = settings if rebased else {**settings, initial.KEY: True}
    settings, found = wrapped.language_model(settings, found, base_modules(base), directory)
    params, base = embeddings.resized(found, params, base, directory)
    rows, found = tokens.split_tokens(settings, found, params, base, directory)
    module = experts if settings.get(experts.KEY) else reading
    settings, params, view = embeddings.untied(settings, found, params, base)
    params = module.attach(settings, form, found, params, view, directory)
    params = embeddings.tied_again(settings, params, base, directory)
    return tokens.insert_tokens(rows, params)


def _folder(base: Base) -> str | None:
    """The folder from which the base was read."""
    return next(iter(getattr(base, "folders", ())), None)


def can_write(params: PyTree) -> bool:
    """Whether `params` hold experts, prompts, prefixes or token embeddings that this format may hold."""
    return any(module.can_write(params) for module in (experts, *WHOLE_MODEL_TYPES.values()))


def save(
    params: PyTree,
    base: Base,
    directory: PathLike,
    *,
    trained: Iterable[str] = (),
    method: Mapping[str, Any] | None = None,
    original: PyTree | None = None,
) -> AnyPath:
    """Writes the adapter in `params`, the adapted tree of `base`, and returns its folder. Every process must call it.

    Args:
      trained: names of all trained leaves; those outside of forms (biases, a classifier's head) are written too.
      method: the config group of the method; `rslora` decides how scales are written as alphas.
      original: the parameters before the method was attached. PiSSA and OLoRA need them: their base is a residual, so
        that an update of rank r becomes one of rank 2r to the original base.

    Raises:
      UserError: for a form, or a trained leaf, that the format cannot hold, and for PiSSA or OLoRA without `original`.
    """
    rows, params, trained = tokens.set_tokens_aside(params, trained)
    module = next((module for module in (experts, *WHOLE_MODEL_TYPES.values()) if module.can_write(params)), writing)
    params, view, tying = embeddings.apart(params, base)
    summary, arrays = module.adapter_content(params, view, trained, dict(method or {}), original)
    summary |= tying
    summary, arrays = tokens.add_tokens(rows, base, summary, arrays)
    if jax.process_index() == 0:
        tensors.write_tensors(directory, arrays)
        files.write_json(as_path(directory) / config.NAME, dict(sorted(summary.items())))
    return as_path(directory)


__all__ = ["FORMS", "AdapterDescription", "can_write", "describe_adapter", "load", "method_group", "save"]
