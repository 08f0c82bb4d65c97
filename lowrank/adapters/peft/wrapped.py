"""Adapters of models whose language model is wrapped with others, read as adapters of the language model alone.

The keys of Gemma 3's have `model.language_model.layers`, or `language_model.model.layers` before transformers 5. The
patterns of the JSON are matched against those paths, and then name the modules of the language model one by one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from absl import logging

from lowrank.adapters.peft import match, tensors
from lowrank.adapters.peft.modules import HEADS, Module
from lowrank.core.errors import plural
from lowrank.core.paths import PathLike
from lowrank.pretrained import wrapped_models

T = TypeVar("T")
_START = re.compile(r"(?P<start>(model\.)?language_model\.(model\.)?)(layers|embed_tokens|norm)\b")


def language_model(
    config: Mapping[str, Any], found: Mapping[str, T], known: Mapping[str, Module], directory: PathLike
) -> tuple[dict[str, Any], dict[str, T]]:
    """`(config, tensors)` in which modules have the paths of the language model alone; unchanged without a wrapper.

    The tensors of other models are left out, which the log says.
    """
    paths = [key.removeprefix(tensors.PREFIX) for key in found]
    start = next((m["start"] for path in paths if (m := _START.match(path))), None)
    if start is None:
        return dict(config), dict(found)
    ours = {new: x for key, x in found.items() if (new := _plain(key))}
    skipped = sorted(key for key in found if not _plain(key))
    if skipped:
        count = plural(len(skipped), "tensor")
        logging.info("%s: the language model is adapted alone; %s skipped, as %s", directory, count, skipped[0])
    outer = {_wrapped(path, start): path for path in known}
    return {**config, **_settings(config, outer, known)}, ours


def _plain(key: str) -> str | None:
    """The key of a tensor of the language model, or None for one of another model."""
    name = wrapped_models.text_name(key.removeprefix(tensors.PREFIX))
    return name and f"{tensors.PREFIX}{name}"


def _wrapped(path: str, start: str) -> str:
    """The path of a module of the language model in the whole model."""
    if path.startswith("model."):
        return start + path.removeprefix("model.")
    return f"language_model.{path}" if start == "language_model.model." else path


def _settings(config: Mapping[str, Any], outer: Mapping[str, str], known: Mapping[str, Module]) -> dict[str, Any]:
    """The keys of the JSON that name modules, with the plain paths of the modules that they name."""
    linear = [path for path, plain in outer.items() if known[plain].linear]
    wanted = config.get("target_modules")
    changed: dict[str, Any] = {}
    if wanted:
        every = isinstance(wanted, str) and wanted.lower() == match.ALL_LINEAR
        heads = [path for path in linear if outer[path].split(".")[0] in HEADS]
        chosen = match.find_targets(config, linear if every else list(outer), heads=heads)
        changed = {"target_modules": [outer[path] for path in chosen]}
    for key in ("rank_pattern", "alpha_pattern"):
        values = {plain: match.pattern_value(config.get(key) or {}, path, None) for path, plain in outer.items()}
        changed[key] = {re.escape(plain): value for plain, value in values.items() if value is not None}
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        changed[key] = None
    saved = _names(config.get("modules_to_save") or ())
    return changed | ({"modules_to_save": saved} if saved else {})


def _names(names: Iterable[str]) -> list[str]:
    return [(wrapped_models.text_name(f"{name}.") or f"{name}.").removesuffix(".") for name in names]
