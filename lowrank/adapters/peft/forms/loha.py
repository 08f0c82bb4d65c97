"""LoHa in PEFT's format, where `hada_w1_a` is `[out, r]`: our `b1`."""

from collections.abc import Sequence
from typing import Any

from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Form, Layer, Part
from lowrank.core.typing import HostArrays
from lowrank.weights.loha import LoHa

_PAIRS = (("a1", "b1"), ("a2", "b2"))


def _peel(w: LoHa, arrays: HostArrays) -> Layer | None:
    del w
    live = ranked.live(arrays, _PAIRS)
    cut = {a: arrays[a][:, live] for a, _ in _PAIRS} | {b: arrays[b][live] for _, b in _PAIRS}
    return Layer({"r": int(live.sum()), "scale": float(arrays["scale"])}, cut) if live.any() else None


def _grow(base: Any, layers: Sequence[Layer | None]) -> LoHa:
    (n_in, n_out), rank = base.shape[-2:], max(layer.settings["r"] for layer in layers if layer)
    factors = {a: ranked.stacked(base, layers, a, (n_in, rank)) for a, _ in _PAIRS}
    factors |= {b: ranked.stacked(base, layers, b, (rank, n_out)) for _, b in _PAIRS}
    return LoHa(base=base, **factors, scale=ranked.scales(base, layers))


LOHA = Form(
    peft_type="LOHA",
    kind=LoHa,
    parts=(
        Part(".hada_w1_a", "b1", lambda n_in, n_out, s: (n_out, s["r"])),
        Part(".hada_w1_b", "a1", lambda n_in, n_out, s: (s["r"], n_in)),
        Part(".hada_w2_a", "b2", lambda n_in, n_out, s: (n_out, s["r"])),
        Part(".hada_w2_b", "a2", lambda n_in, n_out, s: (s["r"], n_in)),
    ),
    flags={},
    reads={**WHERE, **ranked.READS, "alpha": 8, "alpha_pattern": {}},
    ignores=("init_weights", "module_dropout", "rank_dropout", "runtime_config", "use_effective_conv2d"),
    only={},
    settings=ranked.settings,
    peel=_peel,
    grow=_grow,
    summary=ranked.summary,
    extra=("scale",),
    conv1d=False,
)
