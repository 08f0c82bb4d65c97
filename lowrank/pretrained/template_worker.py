"""The program that renders chat templates: `template_process` starts it, and stops it where a template does not end.

It reads requests and writes replies, each of a length and a value in Python's `marshal` format. Its memory is limited,
and each rendering's seconds of the processor. It imports nothing of the package, so that it starts at once.
"""

import datetime
import functools
import json
import marshal
import math
import resource
import signal
import sys
from typing import Any, BinaryIO, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

BEGIN, END = "\ufdd0", "\ufdd1"  # around what is generated while a template renders; Unicode keeps them from texts
SECONDS, BYTES, CHARACTERS = 2.0, 2**30, 2**26


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, whose text is marked."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.CallBlock:
        """A call of `_mark` with the text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render(template: str, variables: dict[str, Any]) -> tuple[str, str]:
    """`(text, "")`, or `("", reason)` where the template refuses or fails, or takes too much time or memory."""
    used, (_, most) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    seconds = math.ceil(used.ru_utime + used.ru_stime + 2 * SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))  # ends the process where one operation takes so long
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        text = _compile(template).render(**variables)
        text.encode()  # half a pair of surrogates is no text
        if len(text) <= CHARACTERS:
            return text, ""
        return "", f"it writes {len(text)} characters, of which {CHARACTERS} are possible"
    except MemoryError:
        return "", f"it takes more than {BYTES >> 30} GiB of memory"
    except Exception as e:  # a template is a program: whatever it does wrong is its fault
        return "", " ".join(str(e).encode(errors="replace").decode().split()) or type(e).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*unused: Any) -> None:
    raise TimeoutError(f"it does not end within {SECONDS:.0f} s")


def receive(stream: BinaryIO) -> Any:
    """The next value of a stream. Raises EOFError at its end."""
    size = stream.read(8)
    data = stream.read(int.from_bytes(size, "little"))
    if len(size) < 8 or not data:
        raise EOFError
    return marshal.loads(data)


def send(stream: BinaryIO, value: Any) -> None:
    """Writes one value. Raises ValueError for what is neither text nor number nor a list or dictionary of these."""
    data = marshal.dumps(value)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def main() -> None:
    """Renders until the other side closes its end."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGPROF, _stop)
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(sys.stdout.buffer, render(*request))


if __name__ == "__main__":
    main()
