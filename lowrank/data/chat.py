"""Conversations: the turns of a record as the tokenizer's chat template writes them, and which parts are learned."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.typing import Tokenizer
from lowrank.data.conversations import CONVERSATIONS, WEIGHT, Conversation, Turns
from lowrank.data.templates import Record, Template

Piece = tuple[str, bool]  # (text, whether it is to be learned)
Span = tuple[int, int]
VARIABLES = ("tools", "documents")  # fields beside the messages that a chat template reads
THOUGHT = "</think>"  # ends what a reasoning model's template leaves out of all answers but the last


@dataclasses.dataclass(frozen=True)
class Chat:
    """Turns as the tokenizer's chat template writes them: a template's two, or those of the record's conversation.

    Every answer of a conversation is learned, with its calls of tools, unless its weight is 0, and the longest of the
    user's turns is the one that is shortened. `tools` and `documents` of a record go to the chat template.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    form: Conversation = CONVERSATIONS["messages"]
    document = False
    closed = True

    def long_text(self, record: Record, where: str) -> str:
        """The template's long field, or the user's longest turn."""
        if self.template:
            return self.template.long_text(record, where)
        messages = self._messages(record, where)
        return messages[_longest(messages, where)]["content"]

    def pieces(self, record: Record, where: str, long: str | None = None) -> list[Piece]:
        """The conversation, its answers to be learned."""
        return turns(self.tokenizer, self._turns(record, where, long), where, self._variables(record, where))

    def prompt(self, record: Record, where: str, long: str | None = None) -> str:
        """The conversation up to the last answer, with the template's start of an answer at the end."""
        messages = self._turns(record, where, long)[:-1]
        return _write(self.tokenizer, messages, where, self._variables(record, where), announce=True)[0]

    def answer(self, record: Record, where: str) -> str:
        """The last answer; a call of tools as JSON."""
        last = self._turns(record, where, None)[-1]
        return (last.get("content") or "").strip() or json.dumps(last.get("tool_calls"), ensure_ascii=False)

    def without_oldest(self, record: Record, where: str) -> Record | None:
        """The record without the first exchange after the system's turn; None where only one exchange is left."""
        if self.template:
            return None
        messages = self._messages(record, where)
        asked = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
        if len(asked) < 2:
            return None
        kept = [turn for turn in messages[: asked[0]] if turn["role"] == "system"]
        return self.form.replace(record, [*kept, *messages[asked[1] :]])

    def _turns(self, record: Record, where: str, long: str | None) -> Turns:
        if self.template:
            prompt, completion = self.template.render(record, where, long)
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        messages = self._messages(record, where)
        if long is not None:
            at = _longest(messages, where)
            messages[at] = {**messages[at], "content": long}
        return messages

    def _messages(self, record: Record, where: str) -> Turns:
        """The record's turns. Raises UserError unless all have text or calls and the last turn is an answer."""
        messages, label = self.form.read(record, where), self.form.label
        for number, turn in enumerate(messages, 1):
            _check_turn(turn, f"{where}: turn {number}", label)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise UserError(f"{where}: {label} must end with an assistant's turn that answers another turn")
        return messages

    def _variables(self, record: Record, where: str) -> dict[str, Any]:
        if self.template:
            return {}
        return {name: _listed(name, record[name], where) for name in VARIABLES if record.get(name) is not None}


def _listed(name: str, value: Any, where: str) -> list[Any]:
    """A list, or the text of one in JSON, as tables store it. Raises UserError for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(f"{where}: {name} must be a list, not {type(value).__name__}")
    return found


def _check_turn(turn: Mapping[str, Any], where: str, label: str) -> None:
    if not isinstance(turn.get("role"), str):
        raise UserError(f"{where} of {label} needs a role and a content, and both must be text")
    calls, content = turn.get("tool_calls"), turn.get("content")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise UserError(f"{where} of {label}: tool_calls must be a list of objects")
    if isinstance(content, list):
        raise UserError(f"{where} of {label} has a content in parts; only text is read: write it as one string")
    if not isinstance(content, str) and not (content is None and calls):
        raise UserError(f"{where} of {label} needs a role and a content, and both must be text")
    if turn["role"] == "assistant" and not (calls or (content or "").strip()):
        raise UserError(f"{where}: empty completion")


def _longest(messages: Sequence[Mapping[str, Any]], where: str) -> int:
    user = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not user:
        raise UserError(f"{where}: a conversation needs a turn of the user")
    return max(user, key=lambda i: len(messages[i]["content"]))


def turns(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str, variables: Mapping[str, Any] | None = None
) -> list[Piece]:
    """The conversation as the tokenizer's chat template writes it, with the assistant's turns to be learned.

    What a template marks as generated is learned, and the end of the turn with it. Otherwise an answer is what follows
    its prompt; where a template writes earlier turns differently (some leave out their reasoning), it is found by its
    text. Raises UserError where the template does not write the last answer after its prompt.
    """
    variables, learns = variables or {}, [turn.get(WEIGHT) != 0 for turn in messages]
    full, marked = _write(tokenizer, messages, where, variables)
    answers = [(i, _with_end(full, span, tokenizer)) for i, span in _numbered(messages, marked, learns, where)]
    answers = answers or _find_answers(tokenizer, messages, full, where, variables)
    pieces, end = [], 0
    for start, stop in (span for i, span in answers if learns[i]):
        pieces += [(full[end:start], False), (full[start:stop], True)]
        end = stop
    return [piece for piece in [*pieces, (full[end:], False)] if piece[0]]


def _numbered(
    messages: Sequence[Mapping[str, Any]], marked: Sequence[Span], learns: Sequence[bool], where: str
) -> list[tuple[int, Span]]:
    """What the template marks, each with the number of its turn.

    Raises UserError where the turns cannot be told and some of them are not learned.
    """
    spoken = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if len(spoken) == len(marked) or not marked:
        return list(zip(spoken, marked, strict=False))
    if not all(learns[i] for i in spoken):
        raise UserError(
            f"{where}: the chat template marks {len(marked)} of {len(spoken)} answers as generated, so that those with "
            "the weight 0 cannot be told from the others: use a template that marks all of them, or none"
        )
    return [(spoken[-1], span) for span in marked]


def _with_end(full: str, span: Span, tokenizer: Tokenizer) -> Span:
    """The span and the token that ends a text, if it follows."""
    start, stop = span
    for i in tokenizer.stop_ids:
        end = tokenizer.token(i)
        if end and full.startswith(end, stop):
            return start, stop + len(end)
    return span


def _find_answers(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], full: str, where: str, variables: Mapping[str, Any]
) -> list[tuple[int, Span]]:
    """The answers in the text of a conversation with the numbers of their turns, in order.

    One that the template leaves out is not among them.
    """
    write = lambda n, announce: _write(tokenizer, messages[:n], where, variables, announce)[0]  # noqa: E731
    last = write(len(messages) - 1, True)
    if not full.startswith(last) or len(last) >= len(full):
        raise UserError(
            f"{where}: the chat template does not write the last answer after its prompt: use another template"
        )
    closing = _closing(full[len(last) :], messages[-1])
    found: list[tuple[int, Span]] = []
    at = 0  # the end of the turns so far
    for i, turn in enumerate(messages[:-1]):
        span = _find_text(full, turn, at, len(last), closing if turn["role"] == "assistant" else "")
        if turn["role"] == "assistant" and i:
            before, through = write(i, True), write(i + 1, False)
            if full.startswith(through) and through.startswith(before) and at <= len(before) < len(through):
                span = len(before), len(through)
            found += [(i, span)] if span else []
        at = span[1] if span else at
    return [*found, (len(messages) - 1, (len(last), len(full)))]


def _closing(written: str, turn: Mapping[str, Any]) -> str:
    """What the template writes after the text of an answer."""
    text = (turn.get("content") or "").strip()
    return written[written.rfind(text) + len(text) :] if text and text in written else ""


def _find_text(full: str, turn: Mapping[str, Any], start: int, stop: int, closing: str) -> Span | None:
    """The answer's text in `full[start:stop]`, without its thoughts if the template leaves these out; and its end."""
    whole = (turn.get("content") or "").strip()
    for text in (whole, whole.rpartition(THOUGHT)[2].strip()):
        at = full.find(text, start, stop) if text else -1
        if at >= 0:
            end = at + len(text)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closing, full[end:stop], strict=False))
            return at, end + len(list(same))
    return None


def _write(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    variables: Mapping[str, Any],
    announce: bool = False,
) -> tuple[str, Sequence[Span]]:
    messages = [{key: value for key, value in turn.items() if key != WEIGHT} for turn in messages]
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=announce, **variables)
    except UserError as e:  # there is no template, or it refuses these turns
        raise UserError(f"{where}: {e}") from None
