"""How a mixture of experts is stored: the families with one, and what they call the parts of a dense layer's MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.models import DecoderConfig
from lowrank.pretrained import hf_files
from lowrank.pretrained.families import FAMILIES

KERNELS = ("gate_proj", "up_proj", "down_proj")
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")  # of the dense one


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family of mixtures, made of dense models of the families `accepts`.

    Names come after those of a layer: `experts` gives the weight of a dense kernel of expert `{e}`, `router` `[E, D]`.
    With `shared`, every token uses one more expert, whose name this is, weighted by `shared_gate` `[1, D]`.
    """

    accepts: tuple[str, ...]
    experts: Mapping[str, str]
    router: str
    shared: str = ""
    shared_gate: str = ""
    own_width: bool = True  # the config has a key for the width of experts, beside that of a dense MLP


def _named(pattern: str) -> dict[str, str]:
    return {kernel: pattern.replace("KERNEL", kernel) for kernel in KERNELS}


LAYOUTS = {
    "mixtral": Layout(
        ("llama", "mistral"),
        {kernel: f"block_sparse_moe.experts.{{e}}.w{i}.weight" for kernel, i in zip(KERNELS, (1, 3, 2), strict=True)},
        "block_sparse_moe.gate.weight",
        own_width=False,
    ),
    "qwen2_moe": Layout(
        ("qwen2", "llama", "mistral"),
        _named("mlp.experts.{e}.KERNEL.weight"),
        "mlp.gate.weight",
        "mlp.shared_expert.KERNEL.weight",
        "mlp.shared_expert_gate.weight",
    ),
    "qwen3_moe": Layout(("qwen3",), _named("mlp.experts.{e}.KERNEL.weight"), "mlp.gate.weight"),
}


def layout_of(where: str, hf_config: Mapping[str, Any], wanted: str | None, shared: bool) -> str:
    """The layout for models with this config. Raises UserError where there is none, or none with a shared expert."""
    family = hf_config.get("model_type")
    names = [n for n, layout in LAYOUTS.items() if family in layout.accepts and (layout.shared or not shared)]
    if wanted is None and names:
        return names[0]
    if wanted in names:
        return str(wanted)
    if wanted is None:
        kept = " with a shared expert" if shared else ""
        raise UserError(f"{where} is a {family}, of which a mixture{kept} has no layout; known: {', '.join(LAYOUTS)}")
    raise unknown(f"architecture for a {family}{' with a shared expert' if shared else ''}:", wanted, names)


def mixture_config(
    where: str, hf_config: Mapping[str, Any], name: str, experts: int, per_token: int, shared: bool, dtype: str
) -> dict[str, Any]:
    """`config.json` of the mixture. Raises UserError for an option of the dense model that it cannot record."""
    dense, family = hf_files.parse_config(where, dict(hf_config)), FAMILIES[name]
    if not isinstance(dense, DecoderConfig):
        raise UserError(f"{where} is an encoder, and experts are made of decoders")
    layout = LAYOUTS[name]
    config = dataclasses.replace(
        dense,
        experts=experts,
        experts_per_token=per_token,
        normalize_gates=True,
        expert_hidden=dense.hidden if layout.own_width else 0,
        shared_hidden=(dense.hidden if shared else 1) if layout.shared else 0,
    )
    written = family.hf_config(config)
    read = family.config(written)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(read, field.name):
            raise UserError(f"{where} has {field.name}={value!r}, which the config of a {name} cannot hold")
    kept = {key: hf_config[key] for key in KEPT if key in hf_config}
    return kept | written | {"torch_dtype": dtype}
