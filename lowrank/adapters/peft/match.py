"""PEFT's rules for targets and patterns: the modules that an adapter's JSON names, and the JSON that names modules.

A module is its path in the torch model, `model.layers.3.self_attn.q_proj`. A list names modules by the ends of their
paths, a string is a regex over whole paths, and a pattern's key is a regex over the end of a path.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lowrank.core import bounded_regex
from lowrank.core.errors import UserError, nearest

ALL_LINEAR = "all-linear"


def is_named(names: str | Iterable[str], path: str) -> bool:
    """Whether a list of path ends, or a regex over whole paths, names `path`."""
    if isinstance(names, str):
        return bounded_regex.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_inside(names: Iterable[str], path: str) -> bool:
    """Whether `path` is, or is inside, a module that `modules_to_save` names; PEFT requires no dot before the name."""
    parts = path.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1) for name in names)


def find_targets(config: Mapping[str, Any], paths: Collection[str], heads: Collection[str] = ()) -> list[str]:
    """The paths that `target_modules` names, without the excluded ones; `all-linear` leaves the `heads` out.

    Raises UserError when it names no path.
    """
    wanted = config["target_modules"]
    if not wanted:
        raise UserError("the adapter's target_modules is empty: it adapts nothing")
    if isinstance(wanted, str) and config.get("layers_to_transform") is not None:
        raise UserError("layers_to_transform needs target_modules to be a list, not a regex")
    all_linear = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    chosen = [p for p in paths if (p not in heads if all_linear else is_named(wanted, p))]
    saved = config.get("modules_to_save") or ()
    chosen = [p for p in chosen if not any(bounded_regex.match(rf"(^|.*\.){m}($|\..*)", p) for m in saved)]
    chosen = [p for p in chosen if not is_named(config.get("exclude_modules") or (), p) and _in_layers(config, p)]
    if not chosen:
        first = wanted if isinstance(wanted, str) else sorted(wanted)[0]
        raise UserError(f"the adapter's target_modules {wanted!r} match no module of the base{nearest(first, paths)}")
    return chosen


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    """`layers_to_transform`: the index is the first number after a name, or after one of `layers_pattern`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or r"[^.]*"
    names = [names] if isinstance(names, str) else names
    start = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
    matches = (bounded_regex.match(rf"{start}{name}\.(\d+)\.", path) for name in names)
    match = next((m for m in matches if m), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of `path` as a regex, or `default`."""
    return next((v for key, v in patterns.items() if bounded_regex.match(rf"(.*\.)?({key})$", path)), default)


def shortest_ends(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest path ends, sorted, that name every path in `chosen` and none in `others`."""
    return sorted({_end(path, others) for path in chosen})


def _end(path: str, others: Collection[str]) -> str:
    parts = path.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1) if not parts[-n].isdigit())
    return next((t for t in tails if not any(is_named([t], other) for other in others)), path)


def split_default(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`(default, patterns)` that give each path its value; the most frequent value is the default."""
    kinds = sorted(set(values.values()))
    default = max(kinds, key=list(values.values()).count)
    patterns = {}
    for kind in kinds:
        if kind != default:
            alike = [p for p, v in values.items() if v == kind]
            patterns |= dict.fromkeys(shortest_ends(alike, [p for p, v in values.items() if v != kind]), kind)
    return default, patterns
