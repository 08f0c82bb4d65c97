"""Chat templates are programs of strangers: they are rendered in a process apart, whose time and memory are limited."""

import atexit
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError
from lowrank.pretrained import template_worker

WAIT = 120.0  # seconds of a clock: the worker ends itself after a few of the processor


class TemplateProcess:
    """A process that renders, started when it is first needed and again after one that was stopped."""

    def __init__(self) -> None:
        self._lock, self._process, self._owner = threading.Lock(), None, 0

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text. Raises UserError where the template refuses or fails, or takes too much time or memory."""
        with self._lock:
            process: Any = self._running()
            try:
                template_worker.send(process.stdin, (template, dict(variables)))
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    if not selector.select(WAIT):
                        raise EOFError
                text, reason = template_worker.receive(process.stdout)
            except ValueError as e:
                text, reason = "", f"a message holds what is no JSON: {e}"
            except (EOFError, OSError):
                self.stop()
                text, reason = "", "it takes too much time or memory"
            except BaseException:  # an interrupt: the reply is still to come
                self.stop()
                raise
        if reason:
            raise UserError(f"the chat template cannot render these messages: {reason}")
        return text

    def _running(self) -> Any:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._owner != os.getpid() or self._process is None:
            command = [sys.executable, "-P", template_worker.__file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C is not for it
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """Ends the process, if this one has started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.close()
            self._process = None


_SHARED: list[TemplateProcess] = [TemplateProcess()]
# A process that is forked starts one of its own: the pipes of its parent, and a lock that may be held, are not for it.
os.register_at_fork(after_in_child=lambda: _SHARED.append(TemplateProcess()))
atexit.register(lambda: _SHARED[-1].stop())


def render(template: str, variables: Mapping[str, Any]) -> str:
    """As `TemplateProcess.render`, by the process that is shared."""
    return _SHARED[-1].render(template, variables)
