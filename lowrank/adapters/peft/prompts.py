"""Prompt tuning, P-tuning and prefix tuning in PEFT's format: one tensor, `prompt_embeddings`, and a classifier's head.

A prompt is `[T, D]`; that of P-tuning is the output of its encoder. A prefix is `[T, 2 L W]`, W = key heads x head
width: each row has layer l's keys at 2l and its values at 2l + 1. The cache holds them unchanged, and the first real
token has position T. Names of other tensors lack the `model.` of adapters of weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import tensors
from lowrank.adapters.peft.config import Content
from lowrank.adapters.peft.modules import HEADS, Base, Place, base_modules
from lowrank.core import tree
from lowrank.core.errors import UserError, nearest, plural
from lowrank.core.paths import PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.models import DecoderConfig

PROMPT, PREFIX = "PROMPT_TUNING", "PREFIX_TUNING"
OPTIONS = {
    PROMPT: "num_prompt",
    "P_TUNING": "num_prompt",
    PREFIX: "prefix_length",
}  # the model option of each peft_type
KEY, ROOT = "prompt_embeddings", "base_model."
_IGNORED = (
    *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
    *("init_weights", "prefix_projection", "modules_to_save", "num_layers", "num_attention_heads", "token_dim"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"),
    *("num_virtual_tokens", "num_transformer_submodules"),
)


def can_write(params: PyTree) -> bool:
    """Whether `params` hold a prompt or a prefix."""
    return "prompt" in params or "prefix" in params


def model_options(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The model options with which the base must be loaded."""
    heads = [shapes[f"{ROOT}{n}.weight"][0] for n in configs.HEAD_MODULES if f"{ROOT}{n}.weight" in shapes]
    length = shapes[KEY][0] if len(shapes.get(KEY, ())) == 2 else 0
    return {OPTIONS[config["peft_type"]]: length} | ({"num_labels": heads[0]} if heads else {})


def load(directory: PathLike, params: PyTree, base: Base, *, any_base: bool = False) -> PyTree:
    """`params`, the tree of `base` loaded with its model options, and the prompt or prefix in it."""
    path, config = as_path(directory) / configs.NAME, configs.parse_json(directory)
    for key, value in config.items():
        if value and key not in (*configs.ABOUT, *_IGNORED):
            raise UserError(f"{path}: {key}={value!r} is not supported{nearest(key, _IGNORED)}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{path}: num_transformer_submodules={config['num_transformer_submodules']} is not supported")
    configs.check_base(config, base.name, directory, any_base)
    option, leaves = OPTIONS[config["peft_type"]], dict(tree.named_leaves(params, is_weight))
    found, places = tensors.read_tensors(directory), _heads(base)
    length = len(found.get(KEY, ()))
    if length and length != getattr(base.config, option):
        raise UserError(
            f"the adapter in {directory} has {plural(length, 'virtual token')}: load its base with {option}={length}"
        )
    _check_readout(base, option)
    size = base.config.width if option == "num_prompt" else _prefix_width(base.config)
    expected = {KEY: (length, size)}
    expected |= {f"{ROOT}{name}": leaves[p.leaf].shape[:: -1 if p.transpose else 1] for name, p in places.items()}
    tensors.check_shapes(directory, found, expected)
    for name, place in places.items():
        array = found[f"{ROOT}{name}"]
        leaves[place.leaf] = jnp.asarray(array.T if place.transpose else array, leaves[place.leaf].dtype)
    leaves |= {name: jnp.asarray(x, leaves[name].dtype) for name, x in _ours(found[KEY], base.config, option).items()}
    return tree.map_named(lambda name, _: leaves[name], params, is_leaf=is_weight)


def adapter_content(
    params: PyTree, base: Base, trained: Iterable[str], method: Mapping[str, Any], original: PyTree | None
) -> Content:
    """The JSON and the tensors of the prompt or prefix in `params`. Raises UserError for other trained leaves."""
    del original
    option = "num_prompt" if "prompt" in params else "prefix_length"
    own = {"prompt/embedding"} if option == "num_prompt" else {"prefix/k", "prefix/v"}
    if len({"prompt", "prefix"} & set(params)) > 1 or any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise UserError("one PEFT adapter holds a prompt, a prefix or rewritten weights, not several of them")
    _check_readout(base, option)
    places = _heads(base)
    rest = {*trained, *getattr(base, "new", ())} - own - {place.leaf for place in places.values()}
    if rest:
        raise UserError(f"a PEFT adapter of a prompt cannot hold the trained leaf {min(rest)}")
    leaves = {name: tensors.on_host(leaf) for name, leaf in tree.named_leaves(params) if name in own}
    arrays = {KEY: _theirs(leaves, base.config, option)}
    for name, place in places.items():
        array = tensors.on_host(dict(tree.named_leaves(params))[place.leaf])
        arrays[f"{ROOT}{name}"] = array.T if place.transpose else array
    summary = _summary(base, option, method, len(arrays[KEY]))
    return summary, arrays


def _summary(base: Base, option: str, method: Mapping[str, Any], length: int) -> dict[str, Any]:
    c, prefix = base.config, option == "prefix_length"
    encoded = method.get("name") == "ptuning"
    encoder = {"encoder_reparameterization_type": method.get("encoder", "mlp").upper()} if encoded else {}
    return {
        **configs.common_keys(PREFIX if prefix else "P_TUNING" if encoded else PROMPT, base),
        "modules_to_save": ["classifier", "score"] if c.num_labels else None,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "num_layers": c.layers,
        "num_attention_heads": c.kv_heads if prefix else c.heads,
        "token_dim": c.kv_heads * c.head_dim if prefix else c.width,
        **({"prefix_projection": False} if prefix else {}),
        **({"encoder_hidden_size": method.get("hidden", c.width), **encoder} if encoded or prefix else {}),
    }


def _heads(base: Base) -> dict[str, Place]:
    """A classifier's tensors: `{torch name: place}`."""
    known = base_modules(base) if base.config.num_labels else {}
    heads = [m for path, m in known.items() if path.split(".")[0] in HEADS]
    return {f"{m.path}.{kind}": place for m in heads for kind, place in m.places().items()}


def _check_readout(base: Base, option: str) -> None:
    if option == "num_prompt" and base.config.num_labels and not isinstance(base.config, DecoderConfig):
        raise UserError(
            "an encoder's prompt cannot be exchanged with PEFT, which classifies by the first virtual token"
        )


def _prefix_width(c: Any) -> int:
    return 2 * c.layers * c.kv_heads * c.head_dim


def _ours(array: np.ndarray, c: Any, option: str) -> dict[str, np.ndarray]:
    if option == "num_prompt":
        return {"prompt/embedding": array / getattr(c, "embed_scale", 1.0)}  # PEFT's are applied after the scale
    k_v = array.reshape(len(array), c.layers, 2, -1).transpose(2, 1, 0, 3)
    return {"prefix/k": k_v[0], "prefix/v": k_v[1]}


def _theirs(leaves: Mapping[str, np.ndarray], c: Any, option: str) -> np.ndarray:
    if option == "num_prompt":
        return leaves["prompt/embedding"] * getattr(c, "embed_scale", 1.0)
    k_v = np.stack([leaves["prefix/k"], leaves["prefix/v"]])  # [2, L, T, W]
    return k_v.transpose(2, 1, 0, 3).reshape(k_v.shape[2], -1)
