"""A pretrained model: found by its name, checked, and read into its parameter tree."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from lowrank.core import config_schema, sharding, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.models import build_model
from lowrank.pretrained import hf_files, load_tensors, quantize_config, quantized_checkpoint, upcycle
from lowrank.pretrained.families import FAMILIES, Config
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.resolve import find
from lowrank.pretrained.tensor_reader import Source, Stored
from lowrank.pretrained.tokenizer import Tokenizer
from lowrank.pretrained.upcycle import Upcycling
from lowrank.weights.quantized.schemes import group_of

PARAM_DTYPES = ("float32", "bfloat16")
# What training may start from scratch.
NEW = r"(prompt|prefix|pooler|head)/.*|(layers|top)/((attn|mlp)_adapter|mlp/routed)/.*"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was read. `name` is how adapters record it; `new` the leaves that no checkpoint holds.

    `quantized` is the `model.quantize` group and the dtype with which it was read, empty for plain parameters;
    `upcycled` the `model.upcycle` group, empty for the model that the checkpoint holds.
    """

    config: Config
    params: PyTree
    tokenizer: Tokenizer
    family: str
    name: str
    hf_config: dict[str, Any]
    new: tuple[str, ...] = ()
    quantized: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    upcycled: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def describe(
    spec: str,
    model: Mapping[str, Any] | None = None,
    *,
    param_dtype: str = "float32",
    quantized: Mapping[str, Any] | str | None = None,
    upcycled: Mapping[str, Any] | None = None,
    cache: Path | str | None = None,
) -> tuple[Config, Tokenizer, PyTree]:
    """`(config, tokenizer, shapes and dtypes of the parameters)` of a model, without reading its tensors.

    `model` overrides fields of the config; `quantized` and `upcycled` are as for `load`. Raises UserError for
    everything that `load` finds wrong without tensors.
    """
    source = find(spec, cache)
    return _describe(source, model or {}, param_dtype, _how(source, quantized, upcycled))


class _How(NamedTuple):
    """What becomes of a checkpoint as it is read."""

    codes: quantize_config.Quantization | None
    upcycling: Upcycling | None
    kept: bool = False  # the checkpoint holds the codes

    def config(self, source: Source, model: Mapping[str, Any]) -> Config:
        config = hf_files.config_of(source.where, source.hf_config)
        if self.upcycling:
            self.upcycling.check(model)
            config = self.upcycling.config(source.where, config)
        return config_schema.replace(config, model, "model")

    def tensors(self, source: Source, config: Config) -> list[Tensor]:
        tensors = FAMILIES[source.hf_config["model_type"]].tensors(config)
        return self.upcycling.tensors(tensors) if self.upcycling else tensors


def _how(source: Source, quantized: Mapping[str, Any] | str | None, upcycled: Mapping[str, Any] | None) -> _How:
    """Raises UserError for a checkpoint in codes that is to be quantised otherwise, or upcycled."""
    quantize_config.refuse_quantised(source.where, source.hf_config)
    scheme, upcycling = quantized_checkpoint.scheme(source.where, source.hf_config), upcycle.build(upcycled)
    if not scheme:
        return _How(quantize_config.build(quantized), upcycling)
    if upcycling or group_of(quantized) not in ({}, scheme):
        raise UserError(f"{source.where} is in codes of {scheme.get('name')} already: it can only be read as it is")
    return _How(quantized_checkpoint.coding(source.where, source.hf_config), None, kept=True)


def _describe(
    source: Source, model: Mapping[str, Any], param_dtype: str, how: _How
) -> tuple[Config, Tokenizer, PyTree]:
    if param_dtype not in PARAM_DTYPES:
        raise unknown("param_dtype", param_dtype, PARAM_DTYPES)
    config = how.config(source, model)
    words = source.tokenizer()
    if words.vocab_size > config.vocab_size:
        raise UserError(
            f"{source.where}: the tokenizer has ids up to {words.vocab_size - 1}, "
            f"the model a vocabulary of {config.vocab_size}"
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), _shapes(config))
    if how.codes is None:
        return config, words, shapes
    new = lambda name: _may_be_new(name, config, set())  # noqa: E731
    return (
        config,
        words,
        quantize_config.shapes(how.codes, shapes, new, *_stored_as(source, how.tensors(source, config), shapes)),
    )


def load(
    spec: str,
    *,
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DEFAULT_RULES,
    model: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | str | None = None,
    upcycled: Mapping[str, Any] | None = None,
    seed: int = 0,
    cache: Path | str | None = None,
) -> Pretrained:
    """Reads a model, each host its own shards; without a mesh everything is on the first device.

    `model` overrides fields of the config (`dtype`, `remat`, `num_labels`, ...). Leaves that no checkpoint holds, of
    prompts, poolers, adapters, added biases and classification heads, are drawn from `seed`. `quantized`, a config's
    `model.quantize` group (`lowrank.pretrained.quantize_config`), has kernels turned into codes one tensor at a time,
    which decode to `param_dtype`; `upcycled`, its `model.upcycle` group (`lowrank.pretrained.upcycle`), has a dense
    decoder read as a mixture of experts. Raises UserError for a corrupt file, for a missing, extra or misshapen
    tensor, and for a tokenizer that does not fit; nothing is read before all of them fit.
    """
    source = find(spec, cache)
    how = _how(source, quantized, upcycled)
    config, words, abstract = _describe(source, model or {}, param_dtype, how)
    layout = (
        jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
        if mesh is None
        else sharding.shardings(abstract, mesh, rules)
    )
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    arrays, new = _read(source, config, dict(tree.named_leaves(placed, is_weight)), seed, how)
    params = traverse_util.unflatten_dict(arrays, sep="/")
    family, about = (
        source.hf_config["model_type"],
        group_of(quantized) or quantized_checkpoint.scheme(source.where, source.hf_config),
    )
    about |= {"param_dtype": param_dtype} if about else {}
    return Pretrained(config, params, words, family, source.name, source.hf_config, new, about, dict(upcycled or {}))


def _read(
    source: Source, config: Config, leaves: dict[str, Any], seed: int, how: _How
) -> tuple[dict[str, Any], tuple[str, ...]]:
    family = FAMILIES[source.hf_config["model_type"]]
    forms, tensors = leaves, how.tensors(source, config)
    if how.kept:
        tensors, leaves = quantized_checkpoint.expanded(tensors, leaves)
    stored = source.tensors([name for tensor in tensors for name in tensor.names])
    own = {t.leaf for t in family.tensors(hf_files.config_of(source.where, source.hf_config))}
    present = [t for t in tensors if any(name in stored for name in t.names) or not _may_be_new(t.leaf, config, own)]
    load_tensors.check(source.where, present, {name: leaf.shape for name, leaf in leaves.items()}, stored)
    _check_extra(source.where, stored, [name for t in present for name in t.names], family.ignored)
    routers = how.upcycling.routers(leaves) if how.upcycling else {}
    new = tuple(sorted(leaves.keys() - {t.leaf for t in present} - routers.keys()))
    read = load_tensors.fill(present, stored, leaves, how.codes)
    read |= routers | _fresh(config, {n: leaves[n] for n in new}, seed)
    return quantized_checkpoint.collected(forms, read) if how.kept else read, new


def _stored_as(
    source: Source, tensors: Sequence[Tensor], shapes: PyTree
) -> tuple[quantize_config.StoredAs, quantize_config.Reader]:
    """What each leaf is read from, a tensor that is missing left to `fill.check`; and how to read a leaf's kernels."""
    of_leaf = {t.leaf: t for t in tensors}
    needed = {name: leaf.shape for name, leaf in tree.named_leaves(shapes)}
    stored = source.tensors([name for t in tensors for name in t.names])
    changed = Path(source.where).stat().st_mtime_ns

    def kernels(leaf: str) -> Iterator[tuple[tuple[Any, ...], str, Callable[[], np.ndarray]]]:
        tensor = of_leaf[leaf]
        load_tensors.check(source.where, [tensor], needed, stored)
        for name in tensor.names:
            part = stored[name]
            read = functools.partial(
                load_tensors.whole, name, part, tensor.transpose != part.flipped, needed[leaf][-2:]
            )
            yield (source.where, changed, name), name, read

    return lambda leaf: [stored[n] for t in filter(None, [of_leaf.get(leaf)]) for n in t.names if n in stored], kernels


def _may_be_new(leaf: str, config: Config, own: set[str]) -> bool:
    if config.biases and re.fullmatch(r"(layers|top)/(attn|mlp)/\w+/bias", leaf):
        return re.sub("^top/", "layers/", leaf) not in own
    return bool(re.fullmatch(NEW, leaf)) and (config.num_labels > 0 or not leaf.startswith("head/"))


def _check_extra(where: str, stored: Mapping[str, Stored], used: Sequence[str], ignored: Sequence[str]) -> None:
    for name in sorted(stored.keys() - set(used)):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise UserError(f"{where}: tensor {name!r} has no place in this model")


@functools.lru_cache(maxsize=16)
def _shapes(config: Config) -> PyTree:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config: Config, key: jax.Array) -> PyTree:
    return build_model(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _fresh(config: Config, leaves: dict[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """New leaves as the model initialises them; the compiler leaves out all the others."""
    if not leaves:
        return {}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        everything = dict(tree.named_leaves(_init(config, key)))
        return {name: everything[name].astype(leaf.dtype) for name, leaf in leaves.items()}

    return jax.jit(init, out_shardings={n: leaf.sharding for n, leaf in leaves.items()})(jax.random.key(seed))
