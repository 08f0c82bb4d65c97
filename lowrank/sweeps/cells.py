"""The cells of a study: one config each, and a key that is the same however the config is spelled."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank import methods
from lowrank.core.config_file import with_changes
from lowrank.core.errors import UserError, unknown
from lowrank.core.files import to_json
from lowrank.data import DataConfig
from lowrank.evaluation.evaluator import EvalConfig
from lowrank.objectives import OBJECTIVES
from lowrank.sweeps.axes import Point
from lowrank.training.config import CheckpointConfig, ModelConfig, RunConfig
from lowrank.training.optimizer import OptimConfig
from lowrank.training.workdir import MAY_CHANGE

# A run may change these and computes the same. Of `checkpoint`, the keys that choose the adapter's step stay.
LEFT_OUT = {*MAY_CHANGE, "notes"} - {"checkpoint"}
LEFT_OUT |= {"checkpoint.every", "checkpoint.keep", "data.prefetch", "data.data_dir", "eval.before"}
GROUPS = {"data": DataConfig, "optim": OptimConfig, "eval": EvalConfig, "model": ModelConfig}
GROUPS |= {"checkpoint": CheckpointConfig}
OPEN = (
    "model",
    "method",
    "objective",
    "optim.args",
)  # groups whose keys depend on a name: the check of a run reads them
LENGTH = 12  # hexadecimal digits of a key: two of a million cells share one with a probability of 0.2 %


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study."""

    key: str
    point: Point
    config: Mapping[str, Any]  # in the types of JSON

    @property
    def label(self) -> str:
        """The cell's values of the axes, as text."""
        return " ".join(f"{key}={spell(value)}" for key, value in self.point.items()) or "the base config"


def spell(value: Any) -> str:
    """A value of an axis as text: a group as its items."""
    return ",".join(f"{k}={spell(v)}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def make_cell(base: Mapping[str, Any], point: Point) -> Cell:
    """The cell of a point. Raises UserError for an axis that the config does not have."""
    known = _flatten(canonical(base, whole=True))
    for key in point:
        _check_axis(base, key, known)
    config = to_json(with_changes(base, point), "config")
    return Cell(cell_key(config), to_json(point, "point"), config)


def make_cells(base: Mapping[str, Any], points: Sequence[Point]) -> list[Cell]:
    """The cells of a base config at the points. Raises UserError for no point, and for two cells of one key."""
    if not points:
        raise UserError("the study has no cell: one of its axes is empty")
    cells: dict[str, Cell] = {}
    for point in points:
        cell = make_cell(base, point)
        if cell.key in cells:
            raise UserError(
                f"two cells are the same run, {cell.key}: {cells[cell.key].label} and {cell.label}; leave one out"
            )
        cells[cell.key] = cell
    return list(cells.values())


def cell_key(config: Mapping[str, Any]) -> str:
    """The hash of a config's canonical form."""
    text = json.dumps(canonical(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def canonical(config: Mapping[str, Any], whole: bool = False) -> dict[str, Any]:
    """The config with defaults filled in and a number in one spelling, without what a run may change unless `whole`.

    Unknown keys stay as they are: the check of the run names them.
    """
    filled = {**_defaults(RunConfig), **config}
    for name, cls in GROUPS.items():
        group = filled.get(name, {})
        filled[name] = {**_defaults(cls), **group} if _is_group(group) else group
    objective = filled["objective"]
    filled["objective"] = _filled(OBJECTIVES, {"name": objective} if isinstance(objective, str) else objective)
    filled["method"] = _filled(methods.METHODS, filled.get("method", {}))
    filled = _spelled(to_json(filled, "config"))
    return filled if whole else _without(filled, LEFT_OUT)


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def _filled(table: Mapping[str, Callable[..., Any]], group: Any) -> Any:
    """A group that names a function, with the defaults of the function's arguments."""
    if not _is_group(group):
        return group
    made_by = table.get(group.get("name", ""))
    parameters = inspect.signature(made_by).parameters.values() if made_by else ()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **group}


def _defaults(cls: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _spelled(value: Any) -> Any:
    """The value with whole numbers as integers, so that 16 and 16.0 are one."""
    if isinstance(value, dict):
        return {key: _spelled(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without(tree: Mapping[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if f"{prefix}{key}" not in names}
    return {k: _without(v, names, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in kept.items()}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all groups and leaves."""
    names = []
    for key, value in tree.items():
        names += [f"{prefix}{key}", *(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else ())]
    return names


def _check_axis(base: Mapping[str, Any], key: str, known: Sequence[str]) -> None:
    """Raises UserError for a key that no config has; keys of an open group are left to the check of the run."""
    group = key.rpartition(".")[0]
    if key in known or (group in OPEN and group.split(".")[0] in base):
        return
    beside = [name for name in known if name.rpartition(".")[0] == group] if group in known else known
    raise unknown("axis", key, beside)
