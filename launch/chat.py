"""A chat on the terminal with one model, or with two beside each other, for `launch.generate`."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping

from lowrank.core.errors import UserError, nearest, plural
from lowrank.generation.conversation import Conversation
from lowrank.generation.generator import Request
from lowrank.generation.voice import Voice

COMMANDS = {"/reset": "begins anew", "/system": "TEXT sets the system's turn and begins anew", "/exit": "ends"}
BuildRequest = Callable[[list[int], int], Request]  # (token ids, the number of the answer)


def chat(voices: Mapping[str, Voice], build: BuildRequest, stop: tuple[str, ...], system: str, max_new: int) -> None:
    """Reads turns from stdin until it ends, and answers each with all `voices`, which are named if they are several."""
    talks = {name: Conversation(v.pretrained.tokenizer, system) for name, v in voices.items()}
    print("; ".join(f"{name} {what}" for name, what in COMMANDS.items()), file=sys.stderr)
    for number, text in enumerate(_lines()):
        word, _, rest = text.partition(" ")
        if word == "/exit":
            return
        if word.startswith("/"):
            talks = _command(word, rest.strip(), talks)
            continue
        for name, voice in voices.items():
            try:
                _answer(name if len(voices) > 1 else "", voice, talks[name], text, build, number, stop, max_new)
            except UserError as e:
                print("error:", " ".join(str(e).split()), file=sys.stderr)


def _command(word: str, rest: str, talks: dict[str, Conversation]) -> dict[str, Conversation]:
    if word not in COMMANDS:
        print(f"unknown command {word!r}{nearest(word, COMMANDS)}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return talks
    kept = {name: rest if word == "/system" else talk.system for name, talk in talks.items()}
    return {name: Conversation(talk.tokenizer, kept[name]) for name, talk in talks.items()}


def _answer(
    name: str,
    voice: Voice,
    talk: Conversation,
    text: str,
    build: BuildRequest,
    number: int,
    stop: tuple[str, ...],
    max_new: int,
) -> None:
    config, before = voice.pretrained.config, talk.dropped
    ids = talk.ask(text, config.max_length - config.num_virtual_tokens - max_new)
    if talk.dropped > before:
        left_out = plural(talk.dropped - before, "exchange")
        print(f"the oldest {left_out} no longer fit into {config.max_length} positions: left out", file=sys.stderr)
    print(f"[{name}] " if name else "", end="", flush=True)
    with interruptible() as interrupted:
        show = lambda part: print(part, end="", flush=True)  # noqa: E731
        answer = voice.write(build(ids, number), stop, show, interrupted)
    print(" (stopped)" if interrupted() else "")
    talk.answer(answer)


def _lines() -> Iterator[str]:
    """The lines of stdin that hold text. Ctrl-C at the prompt says how to end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a wrong byte ends the chat with a trace
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit ends the chat", file=sys.stderr)
            continue
        if not is_utf8(text):
            print("error: this line holds bytes that are not UTF-8 text: write it anew", file=sys.stderr)
        elif text:
            yield text


def is_utf8(text: str) -> bool:
    """Whether a text of the terminal holds no byte that Python could not decode, which it keeps as half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A context in which Ctrl-C ends no program; the function that it yields says whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
