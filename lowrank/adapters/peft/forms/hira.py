"""HiRA in PEFT's format: no alpha, and the update is the base times `A @ B`.

PEFT 0.21.2 has a `rank_pattern` here and ignores it: every module has rank `r`. So it is not read, and smaller ranks
are padded with zeros in files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Settings
from lowrank.core.typing import HostArrays
from lowrank.weights.hira import HiRA


def _peel(w: HiRA, arrays: HostArrays) -> Layer | None:
    del w
    live = ranked.nonzero_ranks(arrays, (("a", "b"),))
    return Layer({"r": int(live.sum())}, {"a": arrays["a"][:, live], "b": arrays["b"][live]}) if live.any() else None


def _grow(base: Any, layers: Sequence[Layer | None]) -> HiRA:
    (n_in, n_out), rank = base.shape[-2:], max(layer.settings["r"] for layer in layers if layer)
    return HiRA(
        base=base,
        a=ranked.stack_layers(base, layers, "a", (n_in, rank)),
        b=ranked.stack_layers(base, layers, "b", (rank, n_out)),
    )


def _level(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers, each padded to the largest rank: PEFT has one rank for all modules."""
    rank = max(layer.settings["r"] for layer in layers.values())

    def padded(layer: Layer) -> Layer:
        more = (0, rank - layer.settings["r"])
        a, b = layer.arrays["a"], layer.arrays["b"]
        return Layer({"r": rank}, {"a": np.pad(a, ((0, 0), more)), "b": np.pad(b, (more, (0, 0)))})

    return {path: padded(layer) for path, layer in layers.items()}


def _summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    del method
    return {"target_modules": match.shortest_ends(modules, others), "r": max(s["r"] for s in modules.values())}


HIRA = PeftForm(
    peft_type="HIRA",
    kind=HiRA,
    parts=(
        Part(".hira_A", "a", lambda n_in, n_out, s: (s["r"], n_in)),
        Part(".hira_B", "b", lambda n_in, n_out, s: (n_out, s["r"])),
    ),
    flags={},
    obeyed_keys={**WHERE, "r": 32, "layers_to_transform": None, "layers_pattern": None},
    ignored_keys=("fan_in_fan_out", "hira_dropout", "init_weights", "rank_pattern", "runtime_config"),
    supported={},
    settings=lambda config, path: {"r": ranked.positive_number(config | {"rank_pattern": {}}, path, "rank", "r")},
    to_layer=_peel,
    from_layers=_grow,
    summary=_summary,
    pad_ranks=_level,
)
