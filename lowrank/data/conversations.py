"""The forms in which records hold conversations: `messages`, ShareGPT's `conversations`, and TRL's pairs of turns.

Each is read as turns `{"role": ..., "content": ...}`. A turn may have the `weight` 0, as OpenAI's records do: it is
then not learned.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lowrank.core.errors import UserError, nearest

Record = Mapping[str, Any]
Turns = list[dict[str, Any]]
WEIGHT = "weight"


class Conversation(NamedTuple):
    """A form of conversation: the fields that it needs, and the turns of a record in and out."""

    fields: tuple[str, ...]
    read: Callable[[Record, str], Turns]  # (record, place) -> turns; raises UserError naming the place
    replace: Callable[[Record, Turns], Record]  # the record with fewer turns, as `read` reads it again

    @property
    def label(self) -> str:
        """The fields, for a reader."""
        return " and ".join(self.fields)


# The names of the roles in ShareGPT's turns and in those that were made of them -> a chat template's.
ROLES = {
    **dict.fromkeys(("assistant", "bing", "chatgpt", "gpt", "model"), "assistant"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("function_response", "observation", "tool"), "tool"),
    "function_call": "assistant",
    "system": "system",
}


def read_turns(record: Record, field: str, where: str) -> Turns:
    """The turns in one field. Raises UserError unless it is a list of objects that is not empty."""
    if field not in record:
        raise UserError(f"{where}: the record has no field {field!r}{nearest(field, record)}")
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {field} must be a list of turns, each with a role and a content")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise UserError(f"{where}: turn {number} of {field} needs a role and a content, and both must be text")
        if turn.get(WEIGHT) not in (None, 0, 1):
            raise UserError(f"{where}: turn {number} of {field} has the weight {turn[WEIGHT]!r}: it must be 0 or 1")
    return [dict(turn) for turn in turns]


def _messages(record: Record, where: str) -> Turns:
    return read_turns(record, "messages", where)


def _sharegpt(record: Record, where: str) -> Turns:
    """Turns of `from` and `value`; a field `system` beside them is the first turn."""
    turns = [
        _sharegpt_turn(turn, f"{where}: turn {number} of conversations")
        for number, turn in enumerate(read_turns(record, "conversations", where), 1)
    ]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and turns[0].get("role") != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def _sharegpt_turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    if "from" not in turn:  # already a role and a content
        return turn
    role, value = turn["from"], turn.get("value")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"{where}: unknown role {role!r}{nearest(role, ROLES)}; known: {known}")
    rest = {key: inner for key, inner in turn.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": ROLES[role], "content": value, **rest}
    try:
        found = json.loads(value)
        calls = found if isinstance(found, list) else [found]
        calls = [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{where}: a function_call must be JSON with a name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": calls, **rest}


def _pair(record: Record, where: str) -> Turns:
    """The prompt's turns, of which none is learned, and the completion's."""
    prompt = read_turns(record, "prompt", where)
    prompt = [{**turn, WEIGHT: 0} if turn.get("role") == "assistant" else turn for turn in prompt]
    return [*prompt, *read_turns(record, "completion", where)]


def _replace_pair(record: Record, turns: Turns) -> Record:
    size = len(record["completion"])
    return {**record, "prompt": turns[:-size], "completion": turns[-size:]}


def is_turns(value: Any) -> bool:
    """Whether a field holds turns and not text."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


CONVERSATIONS = {  # name of the template -> form
    "messages": Conversation(("messages",), _messages, lambda record, turns: {**record, "messages": turns}),
    "conversations": Conversation(
        ("conversations",), _sharegpt, lambda record, turns: {**record, "conversations": turns, "system": None}
    ),
    "turns": Conversation(("prompt", "completion"), _pair, _replace_pair),
}
