"""A base model in codes on disk, by any scheme: with GPTQ and AWQ calibrated by data, with the others by rounding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data, pretrained
from lowrank.core import files, tree
from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike, as_local_path
from lowrank.core.typing import PyTree
from lowrank.pretrained import Pretrained
from lowrank.pretrained.quantize_config import build_rounding, calibration_options
from lowrank.pretrained.tensor_reader import check_finite
from lowrank.quantization import awq, gptq
from lowrank.quantization.calibration_data import TokenRows, calibration_batches
from lowrank.quantization.layer_runner import LayerRunner
from lowrank.weights.quantized.schemes import scheme_group

CALIBRATORS = {"gptq": gptq.quantize_gptq, "awq": awq.quantize_awq}


def write_quantized(
    model: str,
    scheme: Mapping[str, Any] | str,
    directory: PathLike,
    *,
    dtype: str = "float32",
    text: data.DataConfig | None = None,
    rows: int = 64,
) -> Path:
    """Quantizes `model` by a scheme's group and writes it for `pretrained.load`; returns the directory.

    `dtype` is the stored dtype of tensors without codes. `text` are the calibration data of gptq and awq, `rows` rows
    of `text.seq_len` tokens. Raises UserError for these schemes without data or with too few, and for all that
    `pretrained.load` and `pretrained.export` raise it for.
    """
    directory, group = as_local_path(directory), scheme_group(scheme)
    build_rounding(group)
    made = f"Codes of {group['name']}"
    if group["name"] not in CALIBRATORS:
        shapes = pretrained.describe(model, quantized=group, param_dtype=dtype)[2]
        files.require_space(directory, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))
        base = pretrained.load(model, quantized=group, param_dtype=dtype)
        return pretrained.export(base.params, base, directory, dtype=dtype, scheme=group, made=made)
    if text is None:
        raise UserError(
            f"{group['name']} needs data to calibrate by: name a source of records, with --data or as `text`"
        )
    config, tokenizer, shapes = pretrained.describe(model)
    least = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * calibration_options(group)["bits"] // 8
    files.require_space(directory, least)
    batches = calibration_batches(text, tokenizer, config, rows)
    base = pretrained.load(model, param_dtype=dtype)
    params = quantize_calibrated(base, group, batches)
    return pretrained.export(params, base, directory, dtype=dtype, scheme=group, made=made)


def quantize_calibrated(base: Pretrained, group: Mapping[str, Any], batches: Sequence[TokenRows]) -> PyTree:
    """The parameters of `base` with the codes of a calibrated scheme, in the shapes of `build_rounding`.

    Layer by layer: all kernels of a layer are quantized at once, by their inputs when the layers before are quantized.
    Raises UserError for a target that is not a kernel of a layer, and for a kernel that is not finite.
    """
    if base.quantized:
        raise UserError(f"{base.name} is in codes already: name the original checkpoint")
    options, quantize = calibration_options(group), CALIBRATORS[group["name"]]
    names = tree.match_names(build_rounding(group).target, tree.leaf_names(base.params), "target")
    runner = LayerRunner(base.config, base.params, names, batches)
    forms: dict[str, list[Any]] = {name: [] for name in names}
    kernels = {n: check_finite(n, np.asarray(x)) for n, x in tree.named_leaves(base.params) if n in forms}
    for stack, i in runner.order:
        codes = {}
        for name, (gram, mean) in runner.kernel_inputs(stack, i).items():
            kernel = kernels[name][i]
            codes[name] = quantize(kernel, gram, mean, **options).with_dtype(kernel.dtype.name)
            forms[name].append(jax.tree.map(np.asarray, codes[name]))
        runner.advance(stack, i, codes)
    stacked = {name: jax.tree.map(lambda *x: jnp.stack(x), *layers) for name, layers in forms.items()}
    return tree.map_named(lambda name, leaf: stacked.get(name, leaf), base.params)
