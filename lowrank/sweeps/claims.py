"""Claims on the cells of a study: the history of a cell is a row of files, each created once and never changed.

`KEY.0001.json`, `KEY.0002.json` and so on are the events of a cell, and the last one is its state. An owner's claim is
an event; so is its end, which holds the result. Whoever adds an event creates the next file, which one writer alone
can do. An owner that was slow and has lost its claim therefore cannot write a result: the number that it needs is
taken by the claim of the next owner. Nor can a result be replaced, as it is the last event.

An owner renews its claim by writing `KEY.0001.beat` anew. A claim is lost when the store's time of that write is older
than the lease. All times are those of the store, so that the clocks of the workers do not matter.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core import generations
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, to_json, write_json
from lowrank.core.paths import AnyPath, exists, read_bytes
from lowrank.sweeps.study import Limits

CLAIMED, STOPPED, FAILED = "claimed", "stopped", "failed"
DONE, DIVERGED, REFUSED, PRUNED = "done", "diverged", "refused", "pruned"
WAITING, RUNNING, LOST = "waiting", "running", "lost"  # states that no event names
FINAL = (DONE, DIVERGED, REFUSED, PRUNED)  # no worker claims such a cell
EVENTS = "events"  # the folder of the files, in that of a study


@dataclasses.dataclass(frozen=True)
class Claim:
    """The right of an owner to run a cell, until its lease ends."""

    key: str
    number: int  # of its event
    owner: str


@dataclasses.dataclass(frozen=True)
class History:
    """The events of one cell, and the store's time of the last sign of its owner."""

    key: str
    events: tuple[Mapping[str, Any], ...] = ()
    seen: float = 0.0

    @property
    def last(self) -> Mapping[str, Any]:
        """The last event; empty for a cell that nobody has claimed."""
        return self.events[-1] if self.events else {}

    @property
    def failures(self) -> int:
        """How often the cell has failed."""
        return sum(event["state"] == FAILED for event in self.events)

    @property
    def stops(self) -> int:
        """How often the cell was preempted or lost its worker."""
        states = [event["state"] for event in self.events]
        return states.count(STOPPED) + sum(a == b == CLAIMED for a, b in itertools.pairwise(states))

    def state(self, now: float, limits: Limits) -> str:
        """The cell's state at the store's time `now`: an event's, or waiting, running or lost."""
        state = self.last.get("state", WAITING)
        if state == CLAIMED:
            return RUNNING if now - self.seen <= limits.lease else LOST
        return state

    def is_final(self, limits: Limits) -> bool:
        """Whether no worker runs the cell again."""
        state = self.last.get("state")
        failed = state == FAILED and self.failures > limits.retries
        return failed or state in FINAL or (state != CLAIMED and self.stops > limits.stops)


class Ledger:
    """The events of all cells in the folder of a study."""

    def __init__(self, folder: AnyPath, limits: Limits):
        """The ledger in `folder`, which need not exist yet."""
        self.folder, self.limits = folder / EVENTS, limits
        self._read: dict[str, Mapping[str, Any]] = {}  # events by file name, as they never change

    def histories(self, keys: Sequence[str]) -> dict[str, History]:
        """The history of each key."""
        times = generations.modified_times(self.folder)
        numbers: dict[str, int] = {}
        for name in times:
            if name.endswith(".json"):
                key, number, _ = name.split(".")
                numbers[key] = max(numbers.get(key, 0), int(number))
        return {key: self._history(key, numbers.get(key, 0), times) for key in keys}

    def claim(self, history: History, owner: str, now: float, **facts: Any) -> Claim | None:
        """Claims a cell for `owner` at the store's time `now`; None if it is claimed, final, or another was faster."""
        if history.is_final(self.limits) or history.state(now, self.limits) == RUNNING:
            return None
        claim = Claim(history.key, len(history.events) + 1, owner)
        return claim if self._add(claim.key, claim.number, {"state": CLAIMED, "owner": owner, **facts}) else None

    def renew(self, claim: Claim, progress: Mapping[str, Any]) -> bool:
        """Renews a claim and notes its progress; False if another worker has taken it over."""
        if exists(self._path(claim.key, claim.number + 1)):
            return False
        write_json(self._path(claim.key, claim.number, "beat"), progress)
        return True

    def close(self, claim: Claim, state: str, **facts: Any) -> bool:
        """Ends a claim with an event; False, with nothing written, if another worker has taken it over."""
        return self._add(claim.key, claim.number + 1, {"state": state, "owner": claim.owner, **facts})

    def progress(self, history: History) -> dict[str, Any]:
        """What the owner of the last claim has noted with its last heartbeat."""
        path = self._path(history.key, len(history.events), "beat")
        try:
            return read_json(path) if exists(path) else {}
        except UserError:  # it is being written
            return {}

    def _add(self, key: str, number: int, event: Mapping[str, Any]) -> bool:
        text = json.dumps(to_json(event, "event"), indent=2, allow_nan=False) + "\n"
        return create(self._path(key, number), text.encode())

    def _path(self, key: str, number: int, kind: str = "json") -> AnyPath:
        return self.folder / f"{key}.{number:04d}.{kind}"

    def _history(self, key: str, count: int, times: Mapping[str, float]) -> History:
        paths = [self._path(key, number) for number in range(1, count + 1)]
        for path in paths:
            if path.name not in self._read:
                self._read[path.name] = read_json(path)
        beat = self._path(key, count, "beat").name
        seen = max((times[name] for name in (beat, *[path.name for path in paths[-1:]]) if name in times), default=0.0)
        return History(key, tuple(self._read[path.name] for path in paths), seen)


def create(path: AnyPath, data: bytes) -> bool:
    """Creates a file with this content; False if it exists with another one.

    A file with the same content is this writer's own: the store has made it, and its reply was lost.
    """
    return generations.create_exclusive(path, data) is not None or read_bytes(path) == data
