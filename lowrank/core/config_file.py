"""A config file, `FILE.py:ARG`, and the changes that a command line makes to it, `config.group.key=value`."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.paths import expand


def load_config(spec: str) -> ConfigDict:
    """`get_config(ARG)` of `FILE.py:ARG`. Raises UserError for a file that cannot be read or refuses ARG."""
    try:
        config = config_flags.ConfigFileFlagParser("config").parse(expand(spec))
        config.items()  # the parser raises its errors only when an item is read
        return config
    except OSError:
        raise UserError(f"config file {spec.partition(':')[0]!r} cannot be read") from None
    except (ValueError, TypeError) as e:
        raise UserError(f"{spec}: {e.__context__ or e}") from None  # the parser wraps it in a traceback's text
    except (SyntaxError, AttributeError, NameError, ImportError) as e:
        raise UserError(f"config file {spec.partition(':')[0]!r} is not a config: {e}") from None


class GroupParser(config_flags.ConfigFileFlagParser):
    """The parser of a config flag whose config gets the groups that the overrides in `names` are of."""

    def __init__(self, names: Sequence[str]):
        super().__init__("config", lock_config=False)
        self._names = names

    def parse(self, path: Any) -> ConfigDict:
        """The config of `FILE.py:ARG`. Raises UserError as `make_groups` does."""
        config = super().parse(path)
        for name in self._names:
            make_groups(config, name)
        return config


def make_groups(config: ConfigDict, name: str) -> ConfigDict:
    """The group of `config.a.b.key`. One below the top that the config lacks, or that is None, is made empty.

    `config.a[1].key` is of the second group of a list. Whoever reads the group refuses a name that it does not know.
    Raises UserError if the config has no group `a`, and for a part of the name that is a value.
    """
    _, *groups, _ = name.split(".")
    for depth, group in enumerate(groups):
        key, _, index = group.removesuffix("]").partition("[")
        if depth == 0 and key not in config:
            raise unknown("config key", name, [f"config.{k}" for k, v in config.items() if hasattr(v, "items")])
        if config.get(key) is None:
            with config.ignore_type(), config.unlocked():
                config[key] = {}
        config = _item(config[key], index, name) if index else config[key]
        if not hasattr(config, "items"):
            raise UserError(f"unknown config key {name!r}: config.{'.'.join(groups[: depth + 1])} is not a group")
    return config


def _item(items: Any, index: str, name: str) -> Any:
    """The group of a list, which the list gets as a ConfigDict."""
    if not isinstance(items, list) or not index.isdigit() or int(index) >= len(items):
        what = f"has {plural(len(items), 'group')}, counted from 0" if isinstance(items, list) else "is no list"
        raise UserError(f"unknown config key {name!r}: what [{index}] is of {what}")
    items[int(index)] = ConfigDict(items[int(index)])
    return items[int(index)]


def override_value(config: ConfigDict, name: str, text: str) -> None:
    """Sets `config.a.b.key` to the value of `text` in the key's type; a new key takes the Python literal or string.

    Raises UserError for a group that does not exist, and for a text that does not have the key's type.
    """
    config, key = make_groups(config, name), name.rpartition(".")[2]
    old = config.get_type(key) if key in config else object
    try:
        value = text if old is str else _literal(text)
        value = float(value) if old is float and isinstance(value, int) else value
        with config.unlocked():
            config[key] = value
    except TypeError:
        raise UserError(f"--{name}={text} is not of type {old.__name__}") from None


def override_word(config: ConfigDict, word: str) -> None:
    """`override_value` of a word of the command line, `--config.a.b=c`, which must have this form."""
    name, equals, value = word.removeprefix("--").partition("=")
    if not equals:
        raise UserError(f"{word} is not --config.KEY=VALUE")
    override_value(config, name, value)


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested groups with the changes `{"group.key": value}`; a missing group is made."""
    copy = {k: with_changes(v, {}) if isinstance(v, Mapping) or hasattr(v, "items") else v for k, v in config.items()}
    for name, value in changes.items():
        *groups, key = name.split(".")
        group = copy
        for part in groups:
            group[part] = {} if group.get(part) is None else group[part]
            group = group[part]
        group[key] = value
    return copy


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        return text
