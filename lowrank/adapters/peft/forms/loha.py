"""LoHa in PEFT's format, where `hada_w1_a` is `[out, r]`: our `b1`."""

from collections.abc import Sequence
from typing import Any

from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm
from lowrank.core.typing import HostArrays
from lowrank.weights.loha import LoHa

_PAIRS = (("a1", "b1"), ("a2", "b2"))


def _peel(w: LoHa, arrays: HostArrays) -> Layer | None:
    del w
    live = ranked.nonzero_ranks(arrays, _PAIRS)
    cut = {a: arrays[a][:, live] for a, _ in _PAIRS} | {b: arrays[b][live] for _, b in _PAIRS}
    return Layer({"r": int(live.sum()), "scale": float(arrays["scale"])}, cut) if live.any() else None


def _grow(base: Any, layers: Sequence[Layer | None]) -> LoHa:
    (n_in, n_out), rank = base.shape[-2:], max(layer.settings["r"] for layer in layers if layer)
    factors = {a: ranked.stack_layers(base, layers, a, (n_in, rank)) for a, _ in _PAIRS}
    factors |= {b: ranked.stack_layers(base, layers, b, (rank, n_out)) for _, b in _PAIRS}
    return LoHa(base=base, **factors, scale=ranked.stack_scales(base, layers))


LOHA = PeftForm(
    peft_type="LOHA",
    kind=LoHa,
    parts=(
        Part(".hada_w1_a", "b1", lambda n_in, n_out, s: (n_out, s["r"])),
        Part(".hada_w1_b", "a1", lambda n_in, n_out, s: (s["r"], n_in)),
        Part(".hada_w2_a", "b2", lambda n_in, n_out, s: (n_out, s["r"])),
        Part(".hada_w2_b", "a2", lambda n_in, n_out, s: (s["r"], n_in)),
    ),
    flags={},
    obeyed_keys={**WHERE, **ranked.READS, "alpha": 8, "alpha_pattern": {}},
    ignored_keys=("init_weights", "module_dropout", "rank_dropout", "runtime_config", "use_effective_conv2d"),
    supported={},
    settings=ranked.rank_settings,
    to_layer=_peel,
    from_layers=_grow,
    summary=ranked.rank_summary,
    extra=("scale",),
    conv1d=False,
)
