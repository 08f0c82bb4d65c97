"""A base model with the adapter of a folder attached: a PEFT adapter, or trained leaves by name."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, peft
from lowrank.adapters.resolve import adapter_folder
from lowrank.core import paths, schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import TrainedLeaves
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.pretrained import Pretrained, companions
from lowrank.pretrained.resolve import is_hub_id
from lowrank.pretrained.tokenizer import load_tokenizer


def load_adapted(
    directory: PathLike,
    spec: str | None = None,
    *,
    any_base: bool = False,
    model: Mapping[str, Any] | None = None,
    param_dtype: str = "float32",
    flag: str = "--base=MODEL",
) -> Pretrained:
    """The model `spec` (by default the one that the adapter records) with the adapter in `directory` attached.

    The folder, or the hub's `ORG/NAME[@REVISION]`, holds a PEFT adapter or the trained leaves of a run by name. `model`
    are further options of the model's config, and `param_dtype` is the dtype of the base, both as in the run that
    trained the adapter. An adapter that was trained on a quantized base gets that base. `flag` is the one that names
    the base, for error texts. Raises UserError for an adapter
    of another base, unless `any_base` is set, and for the reasons of `pretrained.load` and `peft.load`.
    """
    directory = adapter_folder(directory)
    read = {"param_dtype": param_dtype, "flag": flag, **adapter_files.base_of(directory)}
    if paths.exists(as_path(directory) / adapter_files.ABOUT):
        return _with_leaves(as_path(directory), spec, model or {}, read)
    about = peft.describe_adapter(directory)
    own_base = about.residual_base is not None and spec in (None, about.residual_base)
    spec = about.residual_base if own_base else spec
    base = _base(spec, about.base, directory, about.revision, model={**(model or {}), **about.model}, **read)
    params = peft.load(directory, base.params, base, any_base=any_base or own_base)
    return with_tokenizer(_resized(_untied(dataclasses.replace(base, params=params))), as_path(directory))


def _untied(base: Pretrained) -> Pretrained:
    """`base` with a config that says so, where the adapter gave a tied model a head of its own."""
    if "head" not in base.params or base.config.num_labels or not getattr(base.config, "tied", False):
        return base
    config, hf_config = dataclasses.replace(base.config, tied=False), {**base.hf_config, "tie_word_embeddings": False}
    return dataclasses.replace(base, config=config, hf_config=hf_config)


def _resized(base: Pretrained) -> Pretrained:
    """`base` with a config that says so, where the adapter brought embeddings of more tokens."""
    rows = base.params["embed"]["embedding"].shape[0]
    if base.config.vocab_size == rows:
        return base
    config = dataclasses.replace(base.config, vocab_size=rows)
    return dataclasses.replace(base, config=config, hf_config={**base.hf_config, "vocab_size": rows})


def with_tokenizer(base: Pretrained, directory: AnyPath) -> Pretrained:
    """`base` with the tokenizer that a local adapter's folder brings, which is then said on stderr, or as it is."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if paths.in_bucket(directory) or not all((directory / name).exists() for name in names):
        return base
    stops = () if (directory / companions.GENERATION).exists() else base.tokenizer.stop_ids
    own = load_tokenizer(directory, base.hf_config, stops).with_rows(base.config.vocab_size)
    if own.config != base.tokenizer.config or own.backend.to_str() != base.tokenizer.backend.to_str():
        print(f"the tokenizer of {directory} takes the place of that of {base.name}", file=sys.stderr)
    return dataclasses.replace(base, tokenizer=own, folders=(str(directory), *base.folders))


def _base(
    spec: str | None, recorded: str | None, directory: PathLike, revision: str | None = None, *, flag: str, **how: Any
) -> Pretrained:
    """The model `spec`, or the recorded base, which may be no more than the name of a folder.

    A base from the hub is read at the recorded `revision`. That a folder's word alone has it fetched is said on stderr.
    """
    if not (spec or recorded):
        raise UserError(f"the adapter in {directory} does not record its base: name it, as {flag}")
    if not spec and is_hub_id(recorded):
        at = f" at revision {revision}" if revision else ""
        print(f"reading {recorded}{at} from the hub: the adapter in {directory} names it as its base", file=sys.stderr)
    same = not spec or spec == recorded
    try:
        return pretrained.load(spec or recorded, revision=revision if same else None, **how)
    except UserError as e:
        if spec:
            raise
        where = f"the adapter in {directory} has the base {recorded!r}"
        raise UserError(f"{where}: {e} (give its place as spec, or as {flag})") from None


def _with_leaves(directory: AnyPath, spec: str | None, model: Mapping[str, Any], read: Mapping[str, Any]) -> Pretrained:
    about = schema.decode(directory / adapter_files.ABOUT, TrainedLeaves)
    recorded, options, group = about["base"], about["model"], about["method"]
    base = _base(spec, recorded, directory, model={**model, **options}, **read)
    method = methods.build_method(group)
    params = methods.attach_for_loading(method, base.params)
    params = adapter_files.load_leaves(directory, params, base.name)
    bound = method.bind(params, None, None) if method.bind else params
    base = dataclasses.replace(base, params=bound, bind=method.bind if bound is params else None)
    return with_tokenizer(base, directory)
