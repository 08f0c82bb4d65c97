"""Loading a pretrained model: its checkpoint is resolved by name, checked, and read into a parameter tree."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from lowrank.core import config_schema, sharding, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import Bind, PyTree
from lowrank.core.weight import is_weight
from lowrank.models import build_model
from lowrank.pretrained import hf_context, hf_files, load_tensors, quantize_config, quantized_checkpoint, upcycle
from lowrank.pretrained.families import FAMILIES, Config
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.quantize_on_load import KernelSource, KernelSources, LoadQuantizer, StoredParts
from lowrank.pretrained.resolve import resolve_checkpoint
from lowrank.pretrained.tensor_reader import CheckpointSource, StoredTensor
from lowrank.pretrained.tokenizer import Tokenizer
from lowrank.pretrained.upcycle import Upcycling
from lowrank.weights.quantized.schemes import scheme_group

PARAM_DTYPES = ("float32", "bfloat16")
# The leaves that training may start from random values, where a checkpoint lacks them.
NEW_LEAVES = r"(prompt|prefix|pooler|head)/.*|(layers|top)/((attn|mlp)_adapter|mlp/routed)/.*"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was read. `name` is how adapters record it; `new` are the leaves that its checkpoint lacks.

    `quantized` is the `model.quantize` group and the dtype with which it was read, empty for plain parameters;
    `upcycled` is the `model.upcycle` group, empty for the model that the checkpoint holds. `folders` hold the files
    that go with it into a checkpoint (`lowrank.pretrained.companions`): where two have one, the first one's is taken.
    `bind` is that of an adapter's method which needs a batch, such as a router of prompts.
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
    folders: tuple[str, ...] = ()
    bind: Bind | None = None


def describe(
    spec: str,
    model: Mapping[str, Any] | None = None,
    *,
    param_dtype: str = "float32",
    quantized: Mapping[str, Any] | str | None = None,
    upcycled: Mapping[str, Any] | None = None,
    cache: Path | str | None = None,
    planned: bool = False,
) -> tuple[Config, Any, PyTree]:
    """`(config, tokenizer, shapes and dtypes of the parameters)` of a model, without reading its tensors.

    `model` overrides fields of the config; `quantized` and `upcycled` are the groups that `load` takes. A directory
    needs no tensors, unless their number format decides the shapes. If it has no tokenizer either, the tokenizer of a
    `planned` model, which is never run, is None. Raises UserError for a config, a tokenizer or an option that is wrong.
    """
    source = resolve_checkpoint(spec, cache)
    conversion = _conversion(source, quantized, upcycled)
    config, shapes = _describe(source, model or {}, param_dtype, conversion)
    return config, None if planned and not source.has_tokenizer() else _tokenizer(source, config), shapes


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
    revision: str | None = None,
) -> Pretrained:
    """Reads a model, each host the shards of its devices; without a mesh all arrays are on the first device.

    `model` overrides fields of the config (`dtype`, `remat`, `num_labels`, ...). Leaves that the checkpoint lacks, of
    prompts, poolers, adapters, added biases and classification heads, are drawn from `seed`. `quantized`, a config's
    `model.quantize` group (`lowrank.pretrained.quantize_config`), turns kernels into codes one tensor at a time, which
    decode to `param_dtype`; `upcycled`, its `model.upcycle` group (`lowrank.pretrained.upcycle`), reads a dense decoder
    as a mixture of experts; `revision` is that of a hub model.

    Raises UserError for a corrupt file, for a missing, extra or misshapen tensor, and for a tokenizer without a token
    that ends a text; all checks come before the first tensor is read.
    """
    source = resolve_checkpoint(spec, cache, revision)
    conversion = _conversion(source, quantized, upcycled)
    config, shapes = _describe(source, model or {}, param_dtype, conversion)
    tokenizer = _tokenizer(source, config)
    params, new = _read(source, config, _with_shardings(shapes, mesh, rules), seed, conversion)
    group = scheme_group(quantized) or quantized_checkpoint.stored_scheme(source.where, source.hf_config)
    return Pretrained(
        config,
        traverse_util.unflatten_dict(params, sep="/"),
        tokenizer,
        source.hf_config["model_type"],
        source.name,
        source.hf_config,
        new,
        group | {"param_dtype": param_dtype} if group else {},
        dict(upcycled or {}),
        (source.where,) if Path(source.where).is_dir() else (),
    )


class _Conversion(NamedTuple):
    """The changes to a checkpoint as it is read."""

    quantizer: LoadQuantizer | None
    upcycling: Upcycling | None
    in_codes: bool = False  # the checkpoint itself holds the codes

    def config(self, source: CheckpointSource, model: Mapping[str, Any]) -> Config:
        config = hf_files.parse_config(source.where, source.hf_config)
        if self.upcycling:
            self.upcycling.check_options(model)
            config = self.upcycling.mixture_config(source.where, config)
        config = config_schema.replace_fields(config, model, "model")
        if not self.upcycling:
            hf_context.extended_config(FAMILIES[source.hf_config["model_type"]], config, source.hf_config)
        return config

    def tensors(self, source: CheckpointSource, config: Config) -> list[Tensor]:
        tensors = FAMILIES[source.hf_config["model_type"]].tensors(config)
        return self.upcycling.expert_tensors(tensors) if self.upcycling else tensors


def _conversion(
    source: CheckpointSource, quantized: Mapping[str, Any] | str | None, upcycled: Mapping[str, Any] | None
) -> _Conversion:
    """Raises UserError for a checkpoint in codes with another scheme or an upcycling."""
    quantize_config.refuse_other_quantization(source.where, source.hf_config)
    scheme = quantized_checkpoint.stored_scheme(source.where, source.hf_config)
    upcycling = upcycle.build_upcycling(upcycled)
    if not scheme:
        return _Conversion(quantize_config.build_quantizer(quantized), upcycling)
    if upcycling or scheme_group(quantized) not in ({}, scheme):
        codes = f"in codes of {scheme.get('name')} already"
        raise UserError(f"{source.where} is {codes}: leave out model.quantize and model.upcycle")
    quantizer = quantized_checkpoint.stored_quantizer(source.where, source.hf_config)
    return _Conversion(quantizer, None, in_codes=True)


def _describe(
    source: CheckpointSource, model: Mapping[str, Any], param_dtype: str, conversion: _Conversion
) -> tuple[Config, PyTree]:
    if param_dtype not in PARAM_DTYPES:
        raise unknown("param_dtype", param_dtype, PARAM_DTYPES)
    config = conversion.config(source, model)
    try:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), _shapes(config))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError) as e:  # of sizes that do not fit together
        reason = str(e).partition("\n")[0] or type(e).__name__
        raise UserError(f"{source.where}: a model of its config cannot be built: {reason}") from None
    if conversion.quantizer is None:
        return config, shapes
    parts, kernels = _stored_leaves(source, conversion.tensors(source, config), shapes)
    is_new = functools.partial(_may_be_new, config=config, stored=frozenset())
    return config, quantize_config.quantized_shapes(conversion.quantizer, shapes, is_new, parts, kernels)


def _tokenizer(source: CheckpointSource, config: Config) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises UserError if no token of the model ends a text."""
    try:
        return source.tokenizer().with_rows(config.vocab_size)
    except UserError as e:
        raise UserError(str(e) if source.where in str(e) else f"{source.where}: {e}") from None


def _with_shardings(shapes: PyTree, mesh: Mesh | None, rules: sharding.Rules) -> dict[str, Any]:
    """`{leaf name: shape or form in shapes}`, with the sharding of each array."""
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = sharding.parameter_shardings(shapes, mesh, rules)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return dict(tree.named_leaves(placed, is_weight))


def _read(
    source: CheckpointSource, config: Config, forms: dict[str, Any], seed: int, conversion: _Conversion
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`({leaf name: array or form}, names of the new leaves)`."""
    family, leaves, tensors = FAMILIES[source.hf_config["model_type"]], forms, conversion.tensors(source, config)
    if conversion.in_codes:
        tensors, leaves = quantized_checkpoint.expand_forms(tensors, forms)
    stored = source.tensors([name for tensor in tensors for name in tensor.names])
    own = {t.leaf for t in family.tensors(hf_files.parse_config(source.where, source.hf_config))}
    present = [t for t in tensors if any(name in stored for name in t.names) or not _may_be_new(t.leaf, config, own)]
    load_tensors.check_tensors(source.where, present, {name: leaf.shape for name, leaf in leaves.items()}, stored)
    _check_extra(source.where, stored, [name for t in present for name in t.names], family.ignored)
    routers = conversion.upcycling.init_routers(leaves) if conversion.upcycling else {}
    new = tuple(sorted(leaves.keys() - {t.leaf for t in present} - routers.keys()))
    read = load_tensors.load_leaves(present, stored, leaves, conversion.quantizer)
    read |= routers | _init_new(config, {n: leaves[n] for n in new}, seed)
    return quantized_checkpoint.collect_forms(forms, read) if conversion.in_codes else read, new


def _stored_leaves(
    source: CheckpointSource, tensors: Sequence[Tensor], shapes: PyTree
) -> tuple[StoredParts, KernelSources]:
    """The tensors of a leaf, without the missing ones, which `check_tensors` reports; and how to read its kernels.

    The files are opened when they are asked for.
    """
    by_leaf = {t.leaf: t for t in tensors}
    needed = {name: leaf.shape for name, leaf in tree.named_leaves(shapes)}
    open_tensors = functools.cache(lambda: source.tensors([name for t in tensors for name in t.names]))
    changed = Path(source.where).stat().st_mtime_ns

    def parts(leaf: str) -> list[StoredTensor]:
        stored = open_tensors()
        return [stored[n] for n in by_leaf[leaf].names if n in stored] if leaf in by_leaf else []

    def kernels(leaf: str) -> Iterator[KernelSource]:
        tensor, stored = by_leaf[leaf], open_tensors()
        load_tensors.check_tensors(source.where, [tensor], needed, stored)
        for name in tensor.names:
            transpose = tensor.transpose != stored[name].flipped
            read = functools.partial(load_tensors.read_kernel, name, stored[name], transpose, needed[leaf][-2:])
            yield KernelSource((source.where, changed, name), name, read)

    return parts, kernels


def _may_be_new(leaf: str, config: Config, stored: set[str] | frozenset[str]) -> bool:
    """Whether a checkpoint may lack the leaf; `stored` are the leaves that the checkpoint's own config has."""
    if config.biases and re.fullmatch(r"(layers|top)/(attn|mlp)/\w+/bias", leaf):
        return re.sub("^top/", "layers/", leaf) not in stored
    return bool(re.fullmatch(NEW_LEAVES, leaf)) and (config.num_labels > 0 or not leaf.startswith("head/"))


def _check_extra(where: str, stored: Mapping[str, Any], used: Sequence[str], ignored: Sequence[str]) -> None:
    for name in sorted(stored.keys() - set(used)):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise UserError(f"{where}: tensor {name!r} has no place in this model")


@functools.lru_cache(maxsize=16)
def _shapes(config: Config) -> PyTree:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config: Config, key: jax.Array) -> PyTree:
    return build_model(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _init_new(config: Config, leaves: dict[str, Any], seed: int) -> dict[str, jax.Array]:
    """New leaves with the model's initial values; the compiler removes the computation of all others."""
    if not leaves:
        return {}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        values = dict(tree.named_leaves(_init(config, key)))
        return {name: values[name].astype(leaf.dtype) for name, leaf in leaves.items()}

    return jax.jit(init, out_shardings={n: leaf.sharding for n, leaf in leaves.items()})(jax.random.key(seed))
