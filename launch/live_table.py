"""The live table of a study: redrawn in place on a terminal, and a line at each change elsewhere."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowrank.sweeps import claims
from lowrank.sweeps.status import HEAD, Status

SHOWN = (claims.RUNNING, claims.LOST, claims.FAILED, claims.REFUSED, claims.DIVERGED, claims.STOPPED)


class LiveTable:
    """Shows a `Status` as often as it is asked to. Use it as a context."""

    def __init__(self, console: Console | None = None, every_seconds: float = 30.0):
        """A table on standard error, or on `console`; without a terminal, a line at least `every_seconds`."""
        self._console = console or Console(stderr=True)
        self._every, self._next, self._last = every_seconds, 0.0, ""
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "LiveTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: Status) -> None:
        """Shows the cells that run or have failed, and how many are in which state."""
        if self._live:
            self._live.update(Group(Text(status.headline()), _table(status, self._console.height - 4)), refresh=True)
            return
        headline = status.headline()
        if headline != self._last or time.monotonic() >= self._next:
            self._next, self._last = time.monotonic() + self._every, headline
            running = [
                f"{key} {step}" + f" ETA {left}" * bool(left) for key, _, _, step, left, _ in status.rows() if step
            ]
            self._console.print("; ".join([headline, *running]), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a line above the table."""
        self._console.print(text, highlight=False, soft_wrap=True)


def _table(status: Status, height: int) -> Table:
    table = Table(*HEAD, box=None, pad_edge=False)
    rows = [row for row in status.rows() if row[2] in SHOWN]
    for row in rows[: max(1, height)]:
        table.add_row(*map(Text, row))
    return table
