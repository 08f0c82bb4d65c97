"""The fused experts of transformers 5, two tensors per layer, split into one tensor per expert.

`experts.gate_up_proj` `[E, 2F, D]` holds each expert's gate above its up, `experts.down_proj` `[E, D, F]` its down.
Mixtral's names differ too: its published checkpoints call the layer `block_sparse_moe`, and the kernels w1, w2, w3.
"""

import re
from collections.abc import Iterable, Mapping

from lowrank.pretrained.tensor_reader import StoredTensor, slice_flat_rows

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NAME = re.compile(rf"(.*\.experts)\.({'|'.join(FUSED)})")
_MIXTRAL = (
    (re.compile(r"\.mlp\.(?=experts\.|gate\.)"), ".block_sparse_moe."),
    (re.compile(r"\.gate_proj\.(?=weight$)"), ".w1."),
    (re.compile(r"\.up_proj\.(?=weight$)"), ".w3."),
    (re.compile(r"\.down_proj\.(?=weight$)"), ".w2."),
)


def split_fused_experts(stored: Mapping[str, StoredTensor], wanted: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, in which fused experts are split into tensors with the `wanted` names."""
    if not any(_NAME.fullmatch(name) for name in stored):
        return dict(stored)
    old = any(".block_sparse_moe." in name for name in wanted)
    return {_renamed(n) if old else n: t for name, tensor in stored.items() for n, t in _parts(name, tensor).items()}


def _renamed(name: str) -> str:
    for pattern, ours in _MIXTRAL:
        name = pattern.sub(ours, name)
    return name


def _parts(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    match = _NAME.fullmatch(name)
    if not match or tensor.flat is None:
        return {name: tensor}
    parts = FUSED[match[2]]
    experts, rows = tensor.shape[0], tensor.shape[1] // len(parts)
    return {
        f"{match[1]}.{e}.{part}.weight": slice_flat_rows(tensor, (e * len(parts) + i) * rows, rows)
        for e in range(experts)
        for i, part in enumerate(parts)
    }
