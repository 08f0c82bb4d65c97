"""LoKr in PEFT's format. The rank, the sizes and two keys of the JSON decide whether a factor is decomposed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Settings
from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.weights.lokr import FactorSizes, LoKr, factor_sizes


def _settings(config: Mapping[str, Any], path: str) -> Settings:
    factor = config["decompose_factor"]
    if not isinstance(factor, int) or (factor < 1 and factor != -1):
        raise UserError(f"the adapter's decompose_factor is {factor!r}: it must be -1 or at least 1")
    return {**ranked.rank_settings(config, path), "factor": factor, "both": bool(config["decompose_both"])}


def _sizes(n_in: int, n_out: int, s: Settings) -> FactorSizes:
    return s["sizes"] if "sizes" in s else factor_sizes(n_in, n_out, s["r"], s["factor"], s["both"])


def _peel(w: LoKr, arrays: HostArrays) -> Layer | None:
    """The rank is that of the low-rank factors; without them `_summary` finds a rank for the JSON."""
    pairs = [(a, b) for a, b in (("a1", "b1"), ("a2", "b2")) if a in arrays]
    live = ranked.nonzero_ranks(arrays, pairs) if pairs else None
    if not (np.any(live) if pairs else np.any(arrays["w2"])):
        return None
    first, second = w.factors()
    m, n, l, k = first[0].shape[-2], second[0].shape[-2], first[-1].shape[-1], second[-1].shape[-1]  # noqa: E741
    cut = {f: x for f, x in arrays.items() if f in ("w1", "w2")}
    for a, b in pairs:
        cut |= {a: arrays[a][:, live], b: arrays[b][live]}
    scale = float(arrays["scale"])
    rank = int(live.sum()) if pairs else None
    return Layer({"r": rank, "scale": scale, "sizes": FactorSizes(m, n, l, k, w.w1 is not None, w.w2 is not None)}, cut)


def _grow(base: Any, layers: Sequence[Layer | None]) -> LoKr:
    present = [layer for layer in layers if layer]
    fields = {tuple(layer.arrays) for layer in present}
    if len(fields) > 1:
        raise UserError("the ranks of one stack decompose a LoKr factor in some layers only: all layers must agree")
    rank = max(layer.settings["r"] for layer in present)
    factors = {}
    for f, array in present[0].arrays.items():
        n_rows, n_columns = array.shape
        shape = {"a": (n_rows, rank), "b": (rank, n_columns), "w": array.shape}[f[0]]
        factors[f] = ranked.stack_layers(base, layers, f, shape)
    return LoKr(base=base, **factors, scale=ranked.stack_scales(base, layers))


def _summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    """The JSON with which PEFT divides every module in the same way. Raises UserError if no such JSON exists."""
    every = [s["sizes"] for s in modules.values()]
    both = any(not s.whole1 for s in every)
    candidates = [method.get("factor", -1), -1, *sorted({x for s in every for x in (s.m, s.l)})]

    def fits(factor: int) -> bool:
        return all(factor_sizes(s.m * s.n, s.l * s.k, 1, factor, both)[:4] == s[:4] for s in every)

    factor = next((f for f in candidates if fits(f)), None)
    ranks = {path: s["r"] or _free(s["sizes"], both, method.get("rank", 8)) for path, s in modules.items()}
    for path, s in modules.items() if factor is not None else ():
        size = s["sizes"]
        if factor_sizes(size.m * size.n, size.l * size.k, ranks[path], factor, both) != size:
            factor = None
    if factor is None:
        raise UserError("no decompose_factor and rank of a LOKR adapter of PEFT divide these kernels in the same way")
    return {
        **ranked.rank_summary({path: {**s, "r": ranks[path]} for path, s in modules.items()}, others, method),
        "decompose_both": both,
        "decompose_factor": factor,
    }


def _free(size: FactorSizes, both: bool, wanted: int) -> int:
    """A rank with which PEFT decomposes neither factor: `wanted`, or the smallest one."""
    least = (max(size.n, size.k, *((size.m, size.l) if both else ())) + 1) // 2
    return max(wanted, least)


def _when(part: Callable[[FactorSizes, int], tuple[int, ...] | None]) -> Callable[[int, int, Settings], Any]:
    return lambda n_in, n_out, s: part(_sizes(n_in, n_out, s), s["r"])


LOKR = PeftForm(
    peft_type="LOKR",
    kind=LoKr,
    parts=(
        Part(".lokr_w1", "w1", _when(lambda s, r: (s.l, s.m) if s.whole1 else None)),
        Part(".lokr_w1_a", "b1", _when(lambda s, r: None if s.whole1 else (s.l, r))),
        Part(".lokr_w1_b", "a1", _when(lambda s, r: None if s.whole1 else (r, s.m))),
        Part(".lokr_w2", "w2", _when(lambda s, r: (s.k, s.n) if s.whole2 else None)),
        Part(".lokr_w2_a", "b2", _when(lambda s, r: None if s.whole2 else (s.k, r))),
        Part(".lokr_w2_b", "a2", _when(lambda s, r: None if s.whole2 else (r, s.n))),
    ),
    flags={},
    obeyed_keys={
        **WHERE,
        **ranked.READS,
        "alpha": 8,
        "alpha_pattern": {},
        "decompose_both": False,
        "decompose_factor": -1,
    },
    ignored_keys=(
        "init_weights",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "runtime_config",
        "use_effective_conv2d",
    ),
    supported={},
    settings=_settings,
    to_layer=_peel,
    from_layers=_grow,
    summary=_summary,
    extra=("scale",),
    conv1d=False,
)
