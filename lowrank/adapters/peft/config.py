"""`adapter_config.json`: its keys, their defaults, and the checks against keys that would change the computation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank.adapters.peft import initial
from lowrank.adapters.peft.forms import FORMS, PeftForm
from lowrank.core import schema
from lowrank.core.errors import UserError, nearest, unknown
from lowrank.core.json_types import AdapterConfig
from lowrank.core.paths import AnyPath, PathLike, as_path, exists
from lowrank.models import DecoderConfig

NAME = "adapter_config.json"
WHOLE_MODEL = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "TRAINABLE_TOKENS",
)  # adapters that are not a set of adapted modules
HEAD_MODULES = ("score", "classifier", "classifier.out_proj")  # the modules whose weight has a row per label
ABOUT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)

Content = tuple[dict[str, Any], dict[str, np.ndarray]]  # an adapter to be written: its JSON and its tensors


def common_keys(peft_type: str, base: Any) -> dict[str, Any]:
    """The keys and values that the JSON of every adapter of `base` has."""
    lm = "CAUSAL_LM" if isinstance(base.config, DecoderConfig) else "FEATURE_EXTRACTION"
    return {
        "peft_type": peft_type,
        "task_type": "SEQ_CLS" if base.config.num_labels else lm,
        "base_model_name_or_path": base.name,
        "revision": None,
        "inference_mode": True,
    }


def read_config(directory: PathLike) -> tuple[dict[str, Any], PeftForm]:
    """The adapter's JSON with PEFT's defaults filled in, and the form it describes.

    Raises UserError for a directory without an adapter, for an unknown `peft_type`, for an unknown key that is switched
    on, and for a value that is not supported.
    """
    path, raw = as_path(directory) / NAME, initial.canonical(parse_json(directory))
    form = _form(raw, path)
    for key, value in raw.items():
        _check(key, value, form, path)
    return {**dict.fromkeys(ABOUT), **form.obeyed_keys, **raw}, form


def parse_json(directory: PathLike) -> dict[str, Any]:
    """The adapter's JSON, unchanged. Raises UserError for a directory without one, and for an unknown `peft_type`."""
    path = as_path(directory) / NAME
    if not exists(path):
        raise UserError(f"{directory} holds no PEFT adapter: it has no {NAME}")
    raw = schema.decode(path, AdapterConfig)
    known = {*(form.peft_type for form in FORMS.values()), *WHOLE_MODEL}
    if raw.get("peft_type") not in known:
        raise unknown(f"peft_type in {path}:", str(raw.get("peft_type")), known)
    return raw


def _form(raw: Mapping[str, Any], path: AnyPath) -> PeftForm:
    peft_type = raw.get("peft_type")
    alike = [form for form in FORMS.values() if form.peft_type == peft_type]
    for form in alike:
        if all(bool(raw.get(key)) == value for key, value in form.flags.items()):
            return form
    flags = ", ".join(alike[0].flags)
    raise UserError(f"{path}: the values of {flags} are not supported together for {peft_type}")


def _check(key: str, value: Any, form: PeftForm, path: AnyPath) -> None:
    known = (*ABOUT, *form.obeyed_keys, *form.ignored_keys, *form.flags)
    if key in form.supported:
        if value not in form.supported[key]:
            raise UserError(
                f"{path}: {key}={value!r} is not supported; known: {', '.join(map(repr, form.supported[key]))}"
            )
    elif key not in known and value:  # an unknown feature that is switched off changes nothing
        raise UserError(f"{path}: {key}={value!r} is not supported{nearest(key, known)}")


def check_base(config: Mapping[str, Any], name: str, directory: PathLike, any_base: bool) -> None:
    """Raises UserError when the adapter records another base than `name`, unless `any_base`."""
    recorded = config["base_model_name_or_path"]
    if recorded and not any_base and not _same(recorded, name):
        raise UserError(
            f"the adapter in {directory} is for base {recorded!r}, the loaded base is {name!r} "
            "(any_base=True, or --any_base, attaches it nevertheless)"
        )


def _same(recorded: str, name: str) -> bool:
    """Hub ids have an owner, directories and wheels only a model name: then only the last parts are compared.

    Upper and lower case are the same.
    """
    recorded, name = (text.rstrip("/").lower() for text in (recorded, name))
    if "/" in recorded and "/" in name:
        return recorded == name
    return recorded.rpartition("/")[2] == name.rpartition("/")[2]
