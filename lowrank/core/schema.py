"""JSON from outside, typed: one line with the file, the key, the type that it must have and what it is.

`json_types` declares the types. Keys that these do not declare are allowed, and stay as they are.
"""

import json
import re
from typing import Any

import msgspec

from lowrank.core.errors import UserError
from lowrank.core.files import parse_json
from lowrank.core.paths import PathLike, as_path, in_bucket, read_bytes, require_file

LARGEST = 2**26  # bytes of a JSON text; the longest index of a checkpoint is a seventh of that
_MESSAGE = re.compile(r"Expected (?P<expected>.*?)(?:, got `(?P<found>\w+)`)?(?: - at `\$\.?(?P<key>.*)`)?", re.DOTALL)
_NAMES = {"`": "", "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_NAMES |= {"object": "an object", "array": "an array"}


def decode(path: PathLike, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a file, whose values have the types of `kind`.

    Raises UserError for a file that is missing, that is none (a pipe, a device, a folder), that is no JSON object or
    too large for one, and for a value of another type, naming its key.
    """
    path = as_path(path)
    try:
        if not in_bucket(path):
            require_file(path, LARGEST)
        data = read_bytes(path)
        value = parse_json(data.decode("utf-8"))
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a pair of surrogates, which no text may hold
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    check(str(path), value, kind)
    return value


def check(where: str, value: Any, kind: Any) -> None:
    """Raises UserError, naming `where` and the key, for the first value in `value` of another type than `kind` has."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise UserError(f"{where}: {_reason(str(e), value)}") from None


def _reason(message: str, value: Any) -> str:
    if missing := re.match(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", message):
        return f"{'.'.join(filter(None, (missing[2], missing[1])))} is missing"
    match = _MESSAGE.fullmatch(message)
    if match is None:
        return message.replace("`", "").replace("$.", "")
    key, expected = match["key"] or "it", " or ".join(_spelled(name) for name in match["expected"].split(" | "))
    try:
        for step in key.split(".") if match["key"] else ():
            value = value[step]
        found = repr(value)
    except (LookupError, TypeError):  # the message does not name keys of mappings
        found = _spelled(match["found"] or "that")
    return f"{key} must be {expected}, not {found if len(found) < 80 else f'{found[:76]} ...'}"


def _spelled(name: str) -> str:
    plain, _, bound = name.replace("`", "").partition(" ")
    return " ".join(filter(None, (_NAMES.get(plain, plain), bound)))
