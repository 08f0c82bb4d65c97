"""Writing a PEFT adapter: the JSON and the tensors of an adapted tree."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import match, tensors
from lowrank.adapters.peft.config import Content
from lowrank.adapters.peft.forms import FORMS, Layer, PeftForm
from lowrank.adapters.peft.modules import HEADS, Base, Module, Place, base_modules, check_conv1d, check_untied
from lowrank.core import tree
from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import PyTree
from lowrank.core.weight import Weight, is_stored, is_weight, materialize
from lowrank.weights.lora import RESIDUAL


def adapter_content(
    params: PyTree, base: Base, trained: Iterable[str], method: Mapping[str, Any], original: PyTree | None
) -> Content:
    """The JSON and the tensors of an adapter of rewritten weights, with the arguments of `peft.save`."""
    if method.get("init") in RESIDUAL and original is None:
        raise UserError(f"an adapter with init={method['init']} is written against the original base: pass original=")
    weights = {n: w for n, w in tree.named_leaves(params, is_weight) if is_weight(w) and not is_stored(w)}
    _check_codes(weights, base)
    form, known = _form(weights), base_modules(base)
    weights = form.bind(weights, params.get("shared")) if form.bind else weights
    layers = _peeled(form, weights, known, dict(tree.named_leaves(original, is_weight)) if original else {})
    places, bias, saved = _others(form, known, layers, {*trained, *getattr(base, "new", ())} - _own(form, weights))
    check_untied(base, places.values())
    leaves = dict(tree.named_leaves(params, is_weight))
    arrays = {key: _tensor(leaves[place.leaf], place) for key, place in places.items()}
    if form.root:
        arrays |= {key: tensors.on_host(x) for key, x in form.root.collect(list(weights.values())).items()}
    for path, layer in layers.items():
        n_in, n_out = weights[known[path].weight.leaf].shape[-2:]
        for part, shape in form.present_parts(n_in, n_out, layer.settings):
            arrays[known[path].key(part)] = part.to_disk(layer.arrays[part.field], shape)
    summary = _summary(form, base, known, layers, method) | bias | {"modules_to_save": saved or None}
    return summary, arrays


def _summary(
    form: PeftForm, base: Base, known: Mapping[str, Module], layers: Mapping[str, Layer], method: Mapping[str, Any]
) -> dict[str, Any]:
    settings = {path: layer.settings for path, layer in layers.items()}
    transposed = [known[path].weight.transpose for path in layers if known[path].linear]
    return {
        **configs.common_keys(form.peft_type, base),
        **({"fan_in_fan_out": not all(transposed)} if "fan_in_fan_out" in form.ignored_keys else {}),
        **form.flags,
        **form.summary(settings, [path for path in known if path not in layers], method),
    }


def _check_codes(weights: Mapping[str, Weight], base: Base) -> None:
    """PEFT's adapters apply to the base that was read: they cannot hold codes that the method made (LoftQ)."""
    for name, w in weights.items():
        if is_stored(getattr(w, "base", None)) and not getattr(base, "quantized", None):
            raise UserError(f"{name} is on codes that the method made, which a PEFT adapter does not hold")


def _form(weights: Mapping[str, Weight]) -> PeftForm:
    """The one form that all the weights have."""
    if not weights:
        raise UserError("nothing to write: the parameters have no adapted weight")
    known = {form.kind: form for form in FORMS.values()}
    for name, w in weights.items():
        if type(w) not in known:
            kinds = ", ".join(sorted(kind.__name__ for kind in known))
            raise UserError(f"{name} is a {type(w).__name__}, which the PEFT format cannot hold; it holds: {kinds}")
        if is_weight(getattr(w, "base", None)) and type(w.base) in known:
            raise UserError(f"{name} is a {type(w).__name__} on a {type(w.base).__name__}: PEFT has one form per layer")
    kinds = {type(w).__name__ for w in weights.values()}
    if len(kinds) > 1:
        raise UserError(f"one PEFT adapter holds one form, not {' and '.join(sorted(kinds))}")
    return known[type(next(iter(weights.values())))]


def _peeled(
    form: PeftForm, weights: Mapping[str, Weight], known: Mapping[str, Module], original: Mapping[str, Any]
) -> dict[str, Layer]:
    """The settings and arrays of every adapted module, by path."""
    layers, homes = {}, {m.weight.leaf for m in known.values() if m.takes(form)}
    for name, w in weights.items():
        if name not in homes:
            raise UserError(f"{name} does not belong to a module of the base{nearest(name, homes)}")
        held = {f: getattr(w, f) for f in (*(p.field for p in form.parts), *form.extra)}
        fields = {f: tensors.on_host(x) for f, x in held.items() if x is not None}
        for path, module in known.items():
            if module.takes(form) and module.weight.leaf == name:
                check_conv1d(form, module)
                at = ... if module.weight.layer is None else module.weight.layer
                layer = form.to_layer(w, {f: x[at] for f, x in fields.items()})
                change = _change(original[name], w.base, at) if layer and name in original and form.rebase else None
                if change is not None and np.any(change):
                    layer = form.rebase(layer, change)
                layers |= {path: layer} if layer else {}
    if not layers:
        raise UserError("nothing to write: every layer of the adapter has rank 0")
    return form.pad_ranks(layers) if form.pad_ranks else layers


def _change(original: Any, base: Any, at: Any) -> np.ndarray:
    """The change to the base of one layer when the method was attached, `[in, out]`."""
    after, before = (tensors.on_host(materialize(w)[at]) for w in (base, original))
    return after - before


def _own(form: PeftForm, weights: Mapping[str, Weight]) -> set[str]:
    """The names of the leaves that are fields of the forms."""
    fields = (*(part.field for part in form.parts), *form.extra)
    return {f"{name}/{field}" for name in weights for field in fields}


def _others(
    form: PeftForm, known: Mapping[str, Module], layers: Mapping[str, Layer], rest: set[str]
) -> tuple[dict[str, Place], dict[str, str], list[str]]:
    """`(place by key, {"bias": mode} if the form has modes, modules_to_save)` of the leaves in `rest`."""
    whole = [m.path for m in known.values() if m.weight and m.weight.layer is None and m.weight.leaf in rest]
    saved = sorted({_saved_name(path) for path in whole})
    kept = [module for path, module in known.items() if match.is_inside(saved, path)]
    places = {f"{tensors.PREFIX}{m.path}.{kind}": place for m in kept for kind, place in m.places().items()}
    rest = rest - {place.leaf for place in places.values()}
    biases = {path: m.bias for path, m in known.items() if m.bias and m not in kept}
    wanted = {place for place in biases.values() if place.leaf in rest}
    modes = {"none": [], form.own_bias: [path for path in biases if path in layers], "all": list(biases)}
    for mode, paths in modes.items() if rest <= {place.leaf for place in wanted} else ():
        if wanted == {biases[path] for path in paths} and (mode == "none" or "bias" in form.obeyed_keys):
            inner = {path: ".base_layer" if path in layers else "" for path in paths}
            places |= {f"{tensors.PREFIX}{path}{inner[path]}.bias": biases[path] for path in paths}
            return places, {"bias": mode} if "bias" in form.obeyed_keys else {}, saved
    raise UserError(f"a PEFT adapter of type {form.peft_type} cannot hold the trained leaf {min(rest)}")


def _saved_name(path: str) -> str:
    """The module that is saved for `path`: a head is saved as one module with all its parts."""
    first = path.split(".")[0]
    return first if first in HEADS else path


def _tensor(leaf: Any, place: Place) -> np.ndarray:
    array = tensors.on_host(materialize(leaf))
    array = array if place.layer is None else array[place.layer]
    return array.T if place.transpose else array
