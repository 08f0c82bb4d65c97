"""A base in codes on disk, by any scheme."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank import pretrained
from lowrank.pretrained import kept
from lowrank.weights.schemes import group_of


def write(model: str, group: Mapping[str, Any] | str, directory: Path | str, *, dtype: str = "float32") -> Path:
    """Quantises `model` by a scheme's group and writes it so that `pretrained.load` reads it; returns the folder.

    `dtype` is what tensors without codes are stored in. Raises UserError as `pretrained.load` and `pretrained.export`.
    """
    group = group_of(group)
    kept.rounding(group)
    base = pretrained.load(model, quantized=group, param_dtype=dtype)
    return pretrained.export(base.params, base, directory, dtype=dtype, scheme=group)
