"""VeRA in PEFT's format: two vectors per module, and the shared matrices once, at the adapter's root.

Without `save_projection` no file holds the matrices: torch's CPU generator draws them from `projection_prng_key`. It is
a Mersenne Twister, and each float32 takes its low 24 bits, so that NumPy draws the same numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Root, Settings
from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.core.weight import Weight
from lowrank.weights import vera
from lowrank.weights.vera import VeRA

A, B = "base_model.vera_A", "base_model.vera_B"
Sizes = Sequence[tuple[int, int]]


def _peel(w: VeRA, arrays: HostArrays) -> Layer | None:
    """A layer whose vectors are both zero is not adapted: `lambda_d` does not start at zero."""
    del w
    return Layer({"r": arrays["lambda_d"].size}, arrays) if any(map(np.any, arrays.values())) else None


def _grow(base: Any, layers: Sequence[Layer | None]) -> VeRA:
    (n_in, n_out), rank = base.shape[-2:], next(layer.settings["r"] for layer in layers if layer)
    shapes = {"lambda_d": (rank,), "lambda_b": (n_out,), "a": (n_in, rank), "b": (rank, n_out)}
    return VeRA(base=base, **{f: ranked.stack_layers(base, layers, f, shape) for f, shape in shapes.items()})


def _summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    return {
        "target_modules": match.shortest_ends(modules, others),
        "r": next(s["r"] for s in modules.values()),
        "save_projection": True,
        "projection_prng_key": method.get("seed", 0),
    }


def _shapes(config: Mapping[str, Any], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    n_in, n_out = map(max, zip(*sizes, strict=True))
    return {A: (config["r"], n_in), B: (n_out, config["r"])}


def _read(config: Mapping[str, Any], sizes: Sizes, found: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    if config["save_projection"]:
        return found
    numbers = np.random.RandomState(config["projection_prng_key"])
    return {key: _drawn(numbers, shape) for key, shape in _shapes(config, sizes).items()}


def _drawn(numbers: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Kaiming uniform with gain sqrt(2), as torch draws it."""
    bits = numbers.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
    bound = np.float32((6 / shape[1]) ** 0.5)
    return bits.astype(np.float32) * np.float32(2**-24) * (2 * bound) - bound


def _hand(root: Mapping[str, np.ndarray], n_in: int, n_out: int) -> HostArrays:
    return {"a": root[A][:, :n_in].T, "b": root[B][:n_out].T}


def _collect(weights: Sequence[VeRA]) -> dict[str, Any]:
    """The whole matrices: the slices of the widest modules."""
    widest = [max(weights, key=lambda w, side=side: w.shape[side]) for side in (-2, -1)]
    a, b = widest[0].a, widest[1].b
    return {A: (a if a.ndim == 2 else a[0]).T, B: (b if b.ndim == 2 else b[0]).T}


def _bind(weights: Mapping[str, Weight], shared: Any) -> dict[str, Weight]:
    if shared is None and any(w.a is None for w in weights.values()):
        raise UserError(
            "the matrices under shared/ are missing, and a VeRA adapter of PEFT holds them: pass the whole tree"
        )
    return {name: vera.with_projections(w, **shared) if w.a is None else w for name, w in weights.items()}


VERA = PeftForm(
    peft_type="VERA",
    kind=VeRA,
    parts=(
        Part(".vera_lambda_b", "lambda_b", lambda n_in, n_out, s: (n_out,), vector=True),
        Part(".vera_lambda_d", "lambda_d", lambda n_in, n_out, s: (s["r"],), vector=True),
    ),
    flags={},
    obeyed_keys={
        **WHERE,
        "r": 256,
        "save_projection": True,
        "projection_prng_key": 0,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
    },
    ignored_keys=("d_initial", "fan_in_fan_out", "init_weights", "runtime_config", "vera_dropout"),
    supported={},
    settings=lambda config, path: {"r": ranked.positive_number(config, path, "rank", "r")},
    to_layer=_peel,
    from_layers=_grow,
    summary=_summary,
    root=Root(
        shapes=lambda config, sizes: _shapes(config, sizes) if config["save_projection"] else {},
        read=_read,
        module_arrays=_hand,
        collect=_collect,
    ),
    bind=_bind,
)
