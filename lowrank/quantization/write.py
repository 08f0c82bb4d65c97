"""A base in codes on disk, by any scheme."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data, pretrained
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.pretrained import Pretrained, quantized_checkpoint
from lowrank.pretrained.tensor_reader import finite
from lowrank.quantization import awq, gptq, texts
from lowrank.quantization.layers import Layers
from lowrank.weights.quantized.schemes import group_of

CALIBRATORS = {"gptq": gptq.quantize, "awq": awq.quantize}


def write(
    model: str,
    group: Mapping[str, Any] | str,
    directory: Path | str,
    *,
    dtype: str = "float32",
    text: data.DataConfig | None = None,
    rows: int = 64,
) -> Path:
    """Quantises `model` by a scheme's group and writes it so that `pretrained.load` reads it; returns the folder.

    `dtype` is what tensors without codes are stored in. `text` are the data that gptq and awq calibrate by, `rows` of
    `text.seq_len` tokens. Raises UserError for these schemes without data, or with too few, and as `pretrained.load`
    and `pretrained.export` do.
    """
    group = group_of(group)
    quantized_checkpoint.rounding(group)
    if group["name"] not in CALIBRATORS:
        base = pretrained.load(model, quantized=group, param_dtype=dtype)
        return pretrained.export(base.params, base, directory, dtype=dtype, scheme=group)
    if text is None:
        raise UserError(f"{group['name']} needs data to calibrate by, and none are named")
    config, tokenizer, _ = pretrained.describe(model)
    batches = texts.batches(text, tokenizer, config, rows)
    base = pretrained.load(model, param_dtype=dtype)
    return pretrained.export(calibrated(base, group, batches), base, directory, dtype=dtype, scheme=group)


def calibrated(base: Pretrained, group: Mapping[str, Any], batches: Sequence[texts.Rows]) -> PyTree:
    """The parameters of `base` with codes by a calibrated scheme, as `kept.rounding` shapes them.

    Layer by layer: the kernels of a layer are quantised, all at once, by the inputs that they get when the layers
    before are quantised. Raises UserError for a target that is no kernel of a layer, and for one that is not finite.
    """
    if base.quantized:
        raise UserError(f"{base.name} is in codes already: name the original checkpoint")
    options, fn = quantized_checkpoint.options(group), CALIBRATORS[group["name"]]
    names = tree.matching(quantized_checkpoint.rounding(group).target, tree.names(base.params), "target")
    layers, made = Layers(base.config, base.params, names, batches), {name: [] for name in names}
    kernels = {name: np.asarray(leaf) for name, leaf in tree.named_leaves(base.params) if name in made}
    for name, kernel in kernels.items():
        finite(name, kernel)
    for stack, i in layers.order:
        codes = {}
        for name, (gram, mean) in layers.inputs(stack, i).items():
            kernel = kernels[name][i]
            codes[name] = fn(kernel, gram, mean, **options).with_dtype(kernel.dtype.name)
            made[name].append(jax.tree.map(np.asarray, codes[name]))
        layers.advance(stack, i, codes)
    stacked = {name: jax.tree.map(lambda *x: jnp.stack(x), *forms) for name, forms in made.items()}
    return tree.map_named(lambda name, leaf: stacked.get(name, leaf), base.params)
