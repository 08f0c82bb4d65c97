"""The layers of a checkpoint as alignment sees them: heads and units of one layer, and the tensors they are stored in.

A leaf is named as in this package's models, such as `attn/q/kernel`; kernels are `[in, out]`, and torch stores most of
them the other way round. Fused kernels are cut into their parts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging.checkpoint import Checkpoint
from lowrank.pretrained import hf_files
from lowrank.pretrained.families import family_of

HEADS = ("q", "k", "v")
Read = Callable[[str], np.ndarray]  # the tensor of a name, as it is stored


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is stored; `out` and `into` are the axes of the stored tensor along its outputs and inputs."""

    name: str
    out: int
    into: int


class Model:
    """The sizes of a model that alignment needs, and the places of its leaves."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises UserError for a model whose symmetries are not known: experts, heads that are interleaved."""
        family = family_of(checkpoint.hf_config)
        config: Any = hf_files.parse_config(checkpoint.source.where, checkpoint.hf_config)
        self.spec, self.config, self.checkpoint = checkpoint.spec, config, checkpoint
        self.depth, self.width, self.units = config.layers, config.width, config.hidden
        self.heads, self.head_dim = config.heads, getattr(config, "head_dim", 0) or config.width // config.heads
        self.groups = getattr(config, "kv_heads", config.heads)
        for reason in ("experts", "qkv_by_head", "relative_buckets"):
            if getattr(config, reason, 0):
                value = getattr(config, reason)
                raise UserError(
                    f"{checkpoint.spec} has {reason}={value}, with which alignment has no rule: leave it out"
                )
        self._inner = {t.leaf.partition("/")[2]: t for t in family.tensors(config) if t.count}
        self.outer = {}
        for tensor in family.tensors(config):
            names = (tensor.hf, tensor.hf.removeprefix(family.prefix))
            if not tensor.count and (found := [n for n in names if n in checkpoint.tensors]):
                self.outer[tensor.leaf] = Place(found[0], *((0, 1) if tensor.transpose else (1, 0)))

    def free_keys(self, layer: int) -> bool:
        """Whether the dimensions of queries and keys may be permuted: neither rope nor a norm tells them apart."""
        c = self.config
        normed = self.config_flag("qk_norm") or self.config_flag("wide_qk_norm")
        return c.ropes[layer] is None and not normed and self.heads == self.groups

    def config_flag(self, name: str) -> bool:
        """An option of the config, False for a config without it."""
        return bool(getattr(self.config, name, False))

    @functools.cached_property
    def leaves(self) -> tuple[str, ...]:
        """The leaves of layers."""
        return tuple(self._inner)

    def place(self, layer: int, leaf: str) -> Place | None:
        """Where a leaf of a layer is stored, None for one that the model lacks."""
        tensor = self._inner.get(leaf)
        if tensor is None:
            return None
        name = self.checkpoint.layer_name(layer, tensor.hf.partition("{i}.")[2])
        return Place(name, *((0, 1) if tensor.transpose else (1, 0))) if name in self.checkpoint.tensors else None

    def rows(self, layer: int, leaf: str, read: Read) -> np.ndarray | None:
        """A Linear's kernel and bias, `[out, in]` or with a bias `[out, in + 1]`; a part of a fused one."""
        kernel = self._read(layer, f"{leaf}/kernel", read)
        if kernel is None:
            return self._part(layer, leaf, read)
        bias = self._read(layer, f"{leaf}/bias", read)
        return kernel.T if bias is None else np.concatenate([kernel.T, bias[:, None]], axis=1)

    def columns(self, layer: int, leaf: str, read: Read) -> np.ndarray:
        """A Linear's kernel `[in, out]`, without the bias, which no order of its inputs moves."""
        kernel = self._read(layer, f"{leaf}/kernel", read)
        assert kernel is not None
        return kernel

    def layer(self, layer: int, read: Read) -> dict[str, np.ndarray]:
        """The arrays of `matching.Layer`."""
        q, k, v = (self.rows(layer, f"attn/{name}", read) for name in HEADS)
        up, gate = (self.rows(layer, f"mlp/{name}", read) for name in ("up", "gate"))
        assert q is not None
        assert k is not None
        assert v is not None
        assert up is not None
        K, d = self.groups, self.head_dim
        o, write = self.columns(layer, "attn/o", read), self.columns(layer, "mlp/down", read)
        return {
            "q": q.reshape(K, -1, d, q.shape[-1]),
            "k": k.reshape(K, d, -1),
            "v": v.reshape(K, d, -1),
            "o": o.reshape(K, -1, d, o.shape[-1]),
            "read": up if gate is None else np.concatenate([gate, up], axis=1),
            "write": write,
        }

    def _read(self, layer: int, leaf: str, read: Read) -> np.ndarray | None:
        place = self.place(layer, leaf)
        if place is None:
            return None
        values = read(place.name)
        return values.T if values.ndim == 2 and place.out == 0 else values

    def _part(self, layer: int, leaf: str, read: Read) -> np.ndarray | None:
        sizes = {"attn/q": self.heads * self.head_dim} | dict.fromkeys(
            ("attn/k", "attn/v"), self.groups * self.head_dim
        )
        units = dict.fromkeys(("mlp/gate", "mlp/up"), self.units)
        fused, parts = ("attn/qkv", sizes) if leaf in sizes else ("mlp/gate_up", units)
        if leaf not in parts or f"{fused}/kernel" not in self._inner:
            return None
        start = sum(size for name, size in list(parts.items())[: list(parts).index(leaf)])
        whole = self.rows(layer, fused, read)
        return None if whole is None else whole[start : start + parts[leaf]]
