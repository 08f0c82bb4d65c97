"""OFT and BOFT in PEFT's format.

Cayley's transform is `(I - Q) (I + Q)^-1` there, and its Neumann series is that of `(I + Q) (I - Q)^-1`: in exact
adapters Q has the opposite sign here. BOFT stores whole matrices, of which PEFT uses only the skew-symmetric part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Settings
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import HostArrays
from lowrank.weights.oft import BOFT, OFT
from lowrank.weights.rotation import block_size

_READS = {**WHERE, "layers_to_transform": None, "layers_pattern": None, "bias": "none"}
_SERIES_SINCE = (0, 18)  # the PEFT version: earlier ones have another series


def _settings(config: Mapping[str, Any], path: str) -> Settings:
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0
    if not isinstance(terms, int):
        raise UserError(f"the adapter's num_cayley_neumann_terms is {terms!r}: it must be a whole number")
    if terms and (terms < 3 or _version(config["peft_version"]) < _SERIES_SINCE):
        raise UserError("the adapter's use_cayley_neumann needs PEFT 0.18 or later and at least 3 terms")
    sizes = _one_of(config, "oft_block_size", "r")
    # PEFT's series of 3 terms equals that of 4
    eps = config["eps"] if config["coft"] else None
    return {**sizes, "share": bool(config["block_share"]), "terms": max(terms, 4) if terms else 0, "eps": eps}


def _version(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split(".")[:2] if part.isdigit())


def _one_of(config: Mapping[str, Any], size: str, count: str) -> Settings:
    values = {key: config[key] or 0 for key in (size, count)}
    if not all(isinstance(v, int) and v >= 0 for v in values.values()) or bool(values[size]) == bool(values[count]):
        raise UserError(f"the adapter needs one of {size} and {count} above 0 and the other 0, and has {values}")
    return {"block": values[size], "count": values[count]}


def _block(n_in: int, s: Settings) -> int:
    """The block size, or the count, that divides the inputs and is nearest to the JSON's."""
    wanted = s["block"] or s["count"]
    near = min((d for d in range(1, n_in + 1) if n_in % d == 0), key=lambda d: abs(d - wanted))
    return near if s["block"] else n_in // near


def _oft_shape(n_in: int, n_out: int, s: Settings) -> tuple[int, ...]:
    del n_out
    b = _block(n_in, s)
    return (1 if s["share"] else n_in // b, b * (b - 1) // 2)


def _peel_oft(w: OFT, arrays: HostArrays) -> Layer | None:
    if not np.any(arrays["skew"]):
        return None
    (rows, _), b = arrays["skew"].shape, block_size(arrays["skew"])
    count = w.shape[-2] // b
    settings = {"block": b, "blocks": count, "share": rows < count, "terms": w.terms}
    return Layer(settings, {"skew": arrays["skew"].reshape(-1) * (1 if w.terms else -1)})


def _grow_oft(base: Any, layers: Sequence[Layer | None]) -> OFT:
    first = next(layer for layer in layers if layer)
    terms, shape = first.settings["terms"], _oft_shape(*base.shape[-2:], first.settings)
    skew = ranked.stack_layers(base, [_unflat(layer, shape) for layer in layers], "skew", shape)
    return OFT(base=base, skew=skew if terms else -skew, terms=terms)


def _unflat(layer: Layer | None, shape: tuple[int, ...]) -> Layer | None:
    """The layer in the shape of leaves, each block projected into COFT's bound eps / sqrt(blocks)."""
    if layer is None:
        return None
    skew, eps = layer.arrays["skew"].reshape(shape), layer.settings["eps"]
    if eps is not None:
        norm = np.linalg.norm(skew, axis=1, keepdims=True) * 2**0.5
        skew = skew * np.minimum(1, eps / shape[0] ** 0.5 / np.maximum(norm, 1e-30))
    return Layer(layer.settings, {"skew": skew})


def _oft_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    del method
    several = {
        path: s for path, s in modules.items() if s["blocks"] > 1
    } or modules  # a single block is the same shared or not
    ways = {(s["share"], s["terms"]) for s in several.values()}
    if len(ways) > 1:
        raise UserError(
            "an OFT adapter of PEFT has one block_share and one Cayley transform for all modules, and these differ"
        )
    ((share, terms),) = ways
    return {
        "target_modules": match.shortest_ends(modules, others),
        **_sizes(modules, "oft_block_size", "r"),
        "block_share": share,
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
        **({"peft_version": "0.18.0"} if terms else {}),  # the first with this series
    }


def _sizes(modules: Mapping[str, Settings], size: str, count: str) -> dict[str, int]:
    for key, other, field in ((size, count, "block"), (count, size, "blocks")):
        values = {s[field] for s in modules.values()}
        if len(values) == 1:
            return {key: values.pop(), other: 0}
    raise UserError(f"a PEFT adapter has one {size} or one {count} for all modules, and these differ in both")


def _boft_settings(config: Mapping[str, Any], path: str) -> Settings:
    return {**_one_of(config, "boft_block_size", "boft_block_num"), "factors": config["boft_n_butterfly_factor"]}


def _boft_shape(n_in: int, n_out: int, s: Settings) -> tuple[int, ...]:
    del n_out
    b, factors = s["block"] or n_in // s["count"], s["factors"]
    possible = isinstance(factors, int) and 1 <= factors <= n_in.bit_length() and b > 0
    if not possible or n_in % (b * 2 ** (factors - 1)) or (factors > 1 and b % 2):
        raise UserError(f"block size {b} and boft_n_butterfly_factor={factors} do not divide {plural(n_in, 'input')}")
    return (factors, n_in // b, b, b)


def _peel_boft(w: BOFT, arrays: HostArrays) -> Layer | None:
    skew = arrays["skew"]
    if not np.any(skew) and np.all(arrays["s"] == 1):
        return None
    (factors, count, _), b = skew.shape, block_size(skew)
    whole = np.zeros((factors, count, b, b), np.float32)
    rows, columns = np.triu_indices(b, 1)
    whole[..., rows, columns], whole[..., columns, rows] = -skew, skew
    return Layer({"block": b, "blocks": count, "factors": factors}, {"skew": whole.reshape(-1), "s": arrays["s"]})


def _grow_boft(base: Any, layers: Sequence[Layer | None]) -> BOFT:
    shape = _boft_shape(*base.shape[-2:], next(layer for layer in layers if layer).settings)
    rows, columns = np.triu_indices(shape[-1], 1)

    def ours(layer: Layer | None) -> Layer:
        if layer is None:
            return Layer({}, {"skew": np.zeros((*shape[:2], rows.size)), "s": np.ones(base.shape[-1])})
        whole = layer.arrays["skew"].reshape(shape)
        skew = (whole[..., columns, rows] - whole[..., rows, columns]) / 2
        return Layer({}, {"skew": skew, "s": layer.arrays["s"]})

    every = [ours(layer) for layer in layers]
    skew = ranked.stack_layers(base, every, "skew", (*shape[:2], rows.size))
    return BOFT(base=base, skew=skew, s=jnp.asarray(ranked.stack_layers(base, every, "s", base.shape[-1:])))


def _boft_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    del method
    factors = {s["factors"] for s in modules.values()}
    if len(factors) > 1:
        raise UserError("a BOFT adapter of PEFT has one number of butterfly factors for all modules, and these differ")
    return {
        "target_modules": match.shortest_ends(modules, others),
        **_sizes(modules, "boft_block_size", "boft_block_num"),
        "boft_n_butterfly_factor": factors.pop(),
    }


OFT_FORM = PeftForm(
    peft_type="OFT",
    kind=OFT,
    parts=(Part(".oft_R.weight", "skew", _oft_shape, vector=True),),
    flags={},
    obeyed_keys={
        **_READS,
        "r": 0,
        "oft_block_size": None,
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    ignored_keys=("fan_in_fan_out", "init_weights", "module_dropout", "runtime_config"),
    supported={},
    settings=_settings,
    to_layer=_peel_oft,
    from_layers=_grow_oft,
    summary=_oft_summary,
    conv1d=False,
)

BOFT_FORM = PeftForm(
    peft_type="BOFT",
    kind=BOFT,
    parts=(
        Part(".boft_R", "skew", _boft_shape, vector=True),
        Part(".boft_s", "s", lambda n_in, n_out, s: (n_out, 1), vector=True),
    ),
    flags={},
    obeyed_keys={**_READS, "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
    ignored_keys=("boft_dropout", "fan_in_fan_out", "init_weights", "runtime_config"),
    supported={},
    settings=_boft_settings,
    to_layer=_peel_boft,
    from_layers=_grow_boft,
    summary=_boft_summary,
    conv1d=False,
)
