"""Checkpoints whose matrices are stored in 8-bit floats with scales; they are multiplied out as the rows are read.

DeepSeek and Qwen store `weight_scale_inv`, one scale per block of `weight_block_size`; compressed-tensors stores
`weight_scale`, one per tensor or per row; Mistral's are one per tensor under either name. All are factors of the codes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.pretrained.tensor_reader import StoredTensor

DTYPES = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")  # after the name of the weight
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")  # of no use to the weights
BLOCK = (128, 128)


def is_fp8(quantization: Any) -> bool:
    """Whether a `quantization_config` is one of weights in 8-bit floats."""
    if not isinstance(quantization, Mapping):
        return False
    if quantization.get("quant_method") == "fp8":
        return True
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
        return False
    weights = [g.get("weights") if isinstance(g, Mapping) else None for g in groups.values()]
    return all(isinstance(w, Mapping) and (w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)


def multiply_scales(where: str, quantization: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, in which 8-bit matrices are float32 and their scales are left out.

    Raises UserError for scales whose shape does not divide their matrix.
    """
    if not is_fp8(quantization):
        return dict(stored)
    scales = {}
    for name, tensor in stored.items():
        beside = [name + end for end in SCALES if name + end in stored]
        if tensor.dtype in DTYPES and len(tensor.shape) == 2 and beside:
            scales[name] = beside[0]
    block = _block_size(where, quantization)
    used = {*scales.values(), *(name for name in stored if name.endswith(ACTIVATION_SCALES))}
    return {
        name: _scaled(where, name, tensor, stored[scales[name]], block) if name in scales else tensor
        for name, tensor in stored.items()
        if name not in used
    }


def _block_size(where: str, quantization: Mapping[str, Any]) -> tuple[int, int]:
    given = quantization.get("weight_block_size")
    given = BLOCK if given is None else given
    if not isinstance(given, list | tuple) or [type(n) for n in given] != [int, int] or min(given) < 1:
        raise UserError(f"{where}: config.json's weight_block_size is {given!r}: it must be two positive numbers")
    return given[0], given[1]


def _scaled(where: str, name: str, tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> StoredTensor:
    rows, columns = tensor.shape
    if math.prod(scale.shape) == 1:
        step = rows, columns
    elif scale.shape in ((rows, 1), (rows,)):
        step = 1, columns
    else:
        step = block
    shape = -(-rows // step[0]), -(-columns // step[1])
    if math.prod(scale.shape) != math.prod(shape) or (len(scale.shape) == 2 and scale.shape != shape):
        raise UserError(f"{where}: the scales of tensor {name!r} {tensor.shape} have shape {scale.shape}, not {shape}")

    def read(start: int, stop: int) -> np.ndarray:
        factors = np.asarray(scale.read(0, scale.shape[0] if scale.shape else 1), np.float32).reshape(shape)
        factors = factors[np.arange(start, stop) // step[0]]
        return tensor.read(start, stop).astype(np.float32) * np.repeat(factors, step[1], axis=1)[:, :columns]

    return dataclasses.replace(tensor, dtype=f"{tensor.dtype} with scales", read=read, readable=scale.readable)
