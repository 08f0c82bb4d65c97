"""LoRA on the kernels of experts in PEFT's format: `target_parameters`, beside the other parts of a LoRA adapter.

Torch has a layer's experts fused, `gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`, with one pair of factors
each: A `[E * r, in]`, whose rows are sorted by expert, and B `[out, r * E]`, whose columns are sorted by rank. Where
both are adapted, the keys of the first have `experts.base_layer`. Gate and up have separate factors here, so that the
fused pair has rank r_gate + r_up, each half feeding one half of the outputs, unless both have the same A.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import match, reading, tensors, writing
from lowrank.adapters.peft.config import Content
from lowrank.adapters.peft.forms import PeftForm, ranked
from lowrank.adapters.peft.modules import Base
from lowrank.core import tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.pretrained.families import FAMILIES
from lowrank.weights.lora import RESIDUAL, LoRA

KEY = "target_parameters"
FUSED = {
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
}  # PEFT's names, in the order in which they nest -> ours
_TENSOR = re.compile(r".*\.experts(\.base_layer)?\.lora_[AB]\.weight")


class Pair(NamedTuple):
    """The factors of one fused parameter of a layer: `a` `[E, in, r]`, `b` `[E, r, out]`, without the scale."""

    a: np.ndarray
    b: np.ndarray


def can_write(params: PyTree) -> bool:
    """Whether `params` hold LoRAs on experts."""
    return any(map(_on_experts, jax.tree.leaves(params, is_leaf=is_weight)))


def _on_experts(w: Any) -> bool:
    return type(w) is LoRA and len(w.shape) == 4


def _layers(base: Base) -> Iterator[tuple[str, str, int]]:
    """`(path of the experts' module, stack, index in the stack)` of every layer."""
    prefix = FAMILIES[base.family].prefix
    for tensor in FAMILIES[base.family].tensors(base.config):
        if tensor.experts and tensor.leaf.endswith("/down/kernel"):
            for i in range(tensor.count):
                yield f"{prefix}layers.{tensor.first + i}.mlp.experts", tensor.leaf.split("/")[0], i


def _keys(path: str, targeted: list[str]) -> dict[str, tuple[str, str]]:
    """The keys of A and B of each fused parameter in `targeted` of one module."""
    inner = {name: ".base_layer" * (len(targeted) - 1 - i) for i, name in enumerate(targeted)}
    return {n: tuple(f"{tensors.PREFIX}{path}{x}.lora_{f}.weight" for f in "AB") for n, x in inner.items()}


def adapter_content(
    params: PyTree, base: Base, trained: Iterable[str], method: Mapping[str, Any], original: PyTree | None
) -> Content:
    """The JSON and the tensors of a LoRA adapter with experts. Raises UserError as `writing.adapter_content` does."""
    if method.get("init") in RESIDUAL:
        raise UserError(f"init={method['init']} changed the experts' kernels, which a PEFT adapter does not hold")
    named = dict(tree.named_leaves(params, is_weight))
    ours = {name: w for name, w in named.items() if _on_experts(w)}
    places = {f"{s}/mlp/experts/{n}/kernel" for _, s, _ in _layers(base) for names in FUSED.values() for n in names}
    for name in ours:
        if name not in places:
            raise UserError(f"{name} is not among the experts that PEFT's {KEY} can name: change the target")
    rest = tree.map_named(lambda name, w: w.base if name in ours else w, params, is_leaf=is_weight)
    others = {*trained} - {f"{name}/{field}" for name in ours for field in "ab"}
    summary, arrays = _rest(rest, base, others, method, original)
    power, scale = 0.5 if method.get("rslora") else 1.0, float(tensors.on_host(next(iter(ours.values())).scale).max())
    pairs = {stack: _fused(ours, stack, scale) for stack in {name.split("/")[0] for name in ours}}
    ranks = {}
    for path, stack, i in _layers(base):
        targeted = [name for name in FUSED if name in pairs.get(stack, {})]
        for name, (key_a, key_b) in _keys(path, targeted).items():
            a, b = pairs[stack][name].a[i], pairs[stack][name].b[i]
            arrays[key_a] = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
            arrays[key_b] = b.transpose(2, 1, 0).reshape(b.shape[2], -1)
            ranks[f"{path}.{name}"] = a.shape[2]
    summary |= {KEY: sorted(ranks), "lora_dropout": 0.0}
    alphas = {path: ranked.undo_rounding(scale * rank**power) for path, rank in ranks.items()}
    for values, default, patterns in ((ranks, "r", "rank_pattern"), (alphas, "lora_alpha", "alpha_pattern")):
        common, _ = match.split_default(values)
        summary.setdefault(default, common)
        others = {path: value for path, value in values.items() if value != summary[default]}
        summary[patterns] = {**summary[patterns], **others}
    return summary, arrays


def _rest(params: PyTree, base: Base, trained: set[str], method: Mapping[str, Any], original: PyTree | None) -> Content:
    """The JSON and the tensors of everything except LoRAs on experts."""
    if any(is_weight(w) for w in jax.tree.leaves(params, is_leaf=is_weight)):
        summary, arrays = writing.adapter_content(params, base, trained, method, original)
        tensors.check_finite("the adapter", arrays)
        return summary, arrays
    if trained or getattr(base, "new", ()):
        raise UserError(f"PEFT's {KEY} has no place for the trained leaf {min({*trained, *base.new})}")
    summary = {
        **configs.common_keys("LORA", base),
        "use_dora": False,
        "use_rslora": bool(method.get("rslora", False)),
        "target_modules": [],
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "init_lora_weights": True,
    }
    return summary, {}


def _fused(ours: Mapping[str, LoRA], stack: str, scale: float) -> dict[str, Pair]:
    """The pair `[L, E, ...]` of each adapted fused parameter, with a common scale: B absorbs the difference."""
    fused = {}
    for theirs, names in FUSED.items():
        kernels = {n: ours.get(f"{stack}/mlp/experts/{n}/kernel") for n in names}
        present = {n: w for n, w in kernels.items() if w is not None}
        if present:
            width = next(iter(present.values())).shape[-1]
            parts = {n: _scaled(w, scale) for n, w in present.items()}
            fused[theirs] = _joined([parts.get(n) for n in names], width)
    return fused


def _scaled(w: LoRA, scale: float) -> Pair:
    a, b, own = (tensors.on_host(x) for x in (w.a, w.b, w.scale))
    return Pair(a, b * (own / scale)[..., None, None])


def _joined(parts: list[Pair | None], width: int) -> Pair:
    """The parts side by side: each has its own outputs, and, unless all have the same A, its own ranks."""
    present = [p for p in parts if p is not None]
    if len(present) == len(parts) and all(np.array_equal(p.a, present[0].a) for p in present):
        return Pair(present[0].a, np.concatenate([p.b for p in present], axis=-1))
    blocks = []
    for i, part in enumerate(parts):
        if part is not None:
            b = np.zeros((*part.b.shape[:-1], width * len(parts)), np.float32)
            b[..., i * width : (i + 1) * width] = part.b
            blocks.append(b)
    return Pair(np.concatenate([p.a for p in present], axis=-1), np.concatenate(blocks, axis=-2))


def attach(
    config: Mapping[str, Any],
    form: PeftForm,
    found: Mapping[str, np.ndarray],
    params: PyTree,
    base: Base,
    directory: PathLike,
) -> PyTree:
    """`params`, the plain tree of `base`, with the adapter attached; the arguments are those of `reading.attach`."""
    if form.kind is not LoRA:
        raise UserError(f"{as_path(directory) / configs.NAME}: {KEY} is supported with plain LoRA only")
    targeted = _targeted(config, base)
    leaves = dict(tree.named_leaves(params, is_weight))
    theirs = {key: x for key, x in found.items() if _TENSOR.fullmatch(key)}
    if _is_swapped(config, theirs, targeted, leaves, base):
        theirs = _swapped(config, theirs, targeted, base)
    _check(directory, config, theirs, targeted, leaves, base)
    rest = {key: x for key, x in found.items() if key not in theirs}
    if rest or config["target_modules"]:
        params = reading.attach(config, form, rest, params, base, directory)
    leaves = dict(tree.named_leaves(params, is_weight)) | _grown(config, theirs, targeted, leaves, base)
    return tree.map_named(lambda name, _: leaves[name], params, is_leaf=is_weight)


def _is_swapped(config: Any, theirs: Any, targeted: Any, leaves: Any, base: Base) -> bool:
    """Whether the factors are those of peft before 0.19, which took the outputs of fused experts for their inputs.

    Where the shapes fit both ways, the version decides. Before 0.18, peft wrote none, but every key that it knew.
    """
    straight, swapped = [], []
    for path, stack, _ in _layers(base):
        for name, (key, _) in _keys(path, targeted.get(path, [])).items():
            *_, n_in, n_out = leaves[f"{stack}/mlp/experts/{FUSED[name][0]}/kernel"].shape
            found = theirs[key].shape[-1] if key in theirs else 0
            straight.append(found == n_in)
            swapped.append(found == n_out * len(FUSED[name]))
    if all(straight) and all(swapped):
        version = config.get("peft_version") or ("0.17" if "megatron_config" in config else "0.19")
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 19)
    return all(swapped)


def _swapped(config: Any, theirs: Mapping[str, np.ndarray], targeted: Any, base: Base) -> dict[str, np.ndarray]:
    """The factors as peft writes them from 0.19 on: A `[E * r, in]` of what was B `[in, r * E]`, and B of A."""
    changed = dict(theirs)
    for path, _, _ in _layers(base):
        for name, (key_a, key_b) in _keys(path, targeted.get(path, [])).items():
            if key_a in theirs and key_b in theirs:
                rank = _settings(config, f"{path}.{name}")[0]
                a, b = theirs[key_a], theirs[key_b]
                if len(a) % rank == 0 and b.shape[1] == len(a):  # else the shapes are refused
                    changed[key_a] = b.reshape(len(b), rank, -1).transpose(2, 1, 0).reshape(len(a), -1)
                    changed[key_b] = a.reshape(-1, rank, a.shape[1]).transpose(2, 1, 0).reshape(a.shape[1], -1)
    return changed


def _targeted(config: Mapping[str, Any], base: Base) -> dict[str, list[str]]:
    """The fused parameters that `target_parameters` names, by the path of their module."""
    every = {path: [f"{path}.{name}" for name in FUSED] for path, _, _ in _layers(base)}
    flat = [full for names in every.values() for full in names]
    for wanted in config[KEY]:
        if not any(match.is_named([wanted], full) for full in flat):
            raise unknown(f"parameter in {KEY}:", wanted, {f"experts.{name}" for name in FUSED})
    chosen = {p: [n for n in FUSED if match.is_named(config[KEY], f"{p}.{n}")] for p in every}
    return {path: names for path, names in chosen.items() if names}


def _settings(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """`(rank, scale)`."""
    rank = int(match.pattern_value(config["rank_pattern"], path, config["r"]))
    alpha = match.pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
    return rank, alpha / rank ** (0.5 if config["use_rslora"] else 1.0)


def _check(directory: Any, config: Any, found: Any, targeted: Any, leaves: Any, base: Base) -> None:
    expected = {}
    for path, stack, _ in _layers(base):
        for name, keys in _keys(path, targeted.get(path, [])).items():
            _, experts, n_in, n_out = leaves[f"{stack}/mlp/experts/{FUSED[name][0]}/kernel"].shape
            rank, outs = experts * _settings(config, f"{path}.{name}")[0], n_out * len(FUSED[name])
            expected |= {keys[0]: (rank, n_in), keys[1]: (outs, rank)}
    tensors.check_shapes(directory, found, expected)


def _grown(config: Any, found: Any, targeted: Any, leaves: Any, base: Base) -> dict[str, LoRA]:
    """The LoRAs by leaf name. Layers without an adapter, and ranks that a half does not use, are zeros."""
    factors: dict[str, dict[int, tuple[np.ndarray, np.ndarray, float]]] = {}
    for path, stack, i in _layers(base):
        for name, (key_a, key_b) in _keys(path, targeted.get(path, [])).items():
            rank, scale = _settings(config, f"{path}.{name}")
            a = found[key_a].reshape(-1, rank, found[key_a].shape[1]).transpose(0, 2, 1)
            b = found[key_b].reshape(found[key_b].shape[0], rank, -1).transpose(2, 1, 0)
            for part, half in zip(FUSED[name], np.split(b, len(FUSED[name]), axis=-1), strict=True):
                live = np.any(half != 0, axis=(0, 2))
                live = live if live.any() else np.ones_like(live)
                made = a[..., live], half[:, live], scale
                factors.setdefault(f"{stack}/mlp/experts/{part}/kernel", {})[i] = made
    return {name: _stacked(leaves[name], layers) for name, layers in factors.items()}


def _stacked(base: Any, layers: Mapping[int, tuple[np.ndarray, np.ndarray, float]]) -> LoRA:
    *stack, n_in, n_out = base.shape
    rank = max(a.shape[-1] for a, _, _ in layers.values())
    a, b = np.zeros((*stack, n_in, rank), np.float32), np.zeros((*stack, rank, n_out), np.float32)
    scales = np.ones(stack, np.float32)
    for i, (layer_a, layer_b, scale) in layers.items():
        a[i, ..., : layer_a.shape[-1]], b[i, :, : layer_b.shape[-2]], scales[i] = layer_a, layer_b, scale
    return LoRA(base=base, a=jnp.asarray(a), b=jnp.asarray(b), scale=jnp.asarray(scales))
