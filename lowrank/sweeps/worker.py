"""A worker: it claims one cell after another, runs each as a process, and writes its result under the claim.

Retries, timeouts, preemption and resumption are here alone. Every engine starts workers, and knows nothing else.
"""

import dataclasses
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core import files
from lowrank.core.errors import UserError
from lowrank.core.exit_codes import BAD_INPUT, DIVERGED, DONE, STOPPED
from lowrank.core.files import read_json
from lowrank.core.generations import store_time
from lowrank.core.paths import exists, in_bucket
from lowrank.sweeps import claims, halving
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.claims import Claim, History, Ledger
from lowrank.sweeps.code_version import code_version
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.process import GRACE, CellProcess
from lowrank.training.log import LOSS, METRICS, read_metrics
from lowrank.training.loop import SUMMARY

BEATS = 4  # heartbeats in a lease
SKEW = 5.0  # seconds by which a clock may be off before it is reported
ENDS = {STOPPED: claims.STOPPED, BAD_INPUT: claims.REFUSED, DIVERGED: claims.DIVERGED}

Command = Callable[[StudyFolder, Cell], Sequence[str]]  # the command that runs a cell in its folder


def new_name() -> str:
    """A worker's name: the host, the process and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class Worker:
    """One worker of a study."""

    def __init__(
        self,
        study: StudyFolder,
        command: Command,
        say: Callable[[str], None] = print,
        name: str = "",
        poll: float = 0.2,
        grace: float = GRACE,
    ):
        """A worker on `study` that runs a cell by `command`.

        `say` prints a line. The processes are looked at every `poll` seconds, and one that is asked to stop has `grace`
        seconds to do so.
        """
        self.study, self.command, self.say, self.name = study, command, say, name or new_name()
        self.ledger, self.limits = Ledger(study.path, study.limits), study.limits
        self._poll, self._grace, self._stopping = poll, grace, False

    def run(self) -> int:
        """Runs cells until none is left; returns 0, or 42 if SIGTERM or SIGINT has come, after its cell has saved."""
        before = self._install_handlers()
        try:
            self._report_skew()
            while not self._stopping:
                now = self._now()  # before the histories are read, so that no claim looks older than it is
                if not (waiting := self._open_histories()):
                    return DONE
                if not self._run_one(waiting, now):
                    self._sleep(self.limits.lease / BEATS)
            return STOPPED
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install_handlers(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _now(self) -> float:
        """The store's time."""
        return store_time(self.study.path)

    def _report_skew(self) -> None:
        skew = self._now() - time.time()
        if abs(skew) > SKEW:
            side = "behind" if skew > 0 else "ahead of"
            self.say(f"this machine's clock is {abs(skew):.0f} s {side} that of {self.study.path}, which leases go by")

    def _open_histories(self) -> list[History]:
        """The cells that are not final: those that nobody has tried yet come first."""
        found = self.ledger.histories([cell.key for cell in self.study.cells]).values()
        return sorted((h for h in found if not h.is_final(self.limits)), key=lambda h: len(h.events))

    def _run_one(self, histories: Sequence[History], now: float) -> bool:
        """Claims the first cell that is free at the store's time `now`, and runs it; False if none is free."""
        facts = {"host": socket.gethostname(), "code": code_version()}
        for history in histories:
            if claim := self.ledger.claim(history, self.name, now, **facts):
                self._run_cell(next(cell for cell in self.study.cells if cell.key == claim.key), claim)
                return True
        return False

    def _run_cell(self, cell: Cell, claim: Claim) -> None:
        self.say(f"{cell.key} starts: {cell.label}")
        attempt = Attempt(self, cell, claim)
        state, facts = attempt.run()
        if state == claims.LOST or not self.ledger.close(claim, state, code=code_version(), **facts):
            state, facts = claims.LOST, {"why": "another worker has taken it over"}
        self.say(f"{cell.key} {state}{': ' + facts['why'] if 'why' in facts else ''}")
        if state == claims.STOPPED:
            self._sleep(self.limits.lease / BEATS)  # what has preempted it may do so again at once

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping:
            time.sleep(min(self._poll, max(0.0, until - time.monotonic())))

    @property
    def stopping(self) -> bool:
        """Whether the worker was asked to stop."""
        return self._stopping

    def start(self, cell: Cell, claim: Claim) -> CellProcess:
        """Starts the process of a cell. Its log is a local file, which `keep_log` copies to a folder in a bucket."""
        log = self.study.log_path(cell.key, claim.number)
        local = Path(tempfile.gettempdir()) / f"{self.name}-{log.name}" if in_bucket(log) else Path(log)
        return CellProcess(self.command(self.study, cell), local, self._grace)

    def keep_log(self, claim: Claim, process: CellProcess) -> None:
        """Leaves the log of a process that has ended in the study's folder."""
        if in_bucket(log := self.study.log_path(claim.key, claim.number)):
            files.write_bytes(log, process.log.read_bytes())
            process.log.unlink()

    def wait(self) -> None:
        """Waits until the processes are looked at again."""
        time.sleep(self._poll)


@dataclasses.dataclass
class Attempt:
    """One try of a worker at a cell under a claim."""

    worker: Worker
    cell: Cell
    claim: Claim
    why: str = ""  # the reason for which the worker has stopped the process as failed
    pruned: dict[str, Any] = dataclasses.field(default_factory=dict)  # the rung at which the cell was stopped

    def run(self) -> tuple[str, dict[str, Any]]:
        """`(state, facts)` of the event that ends the claim; the state `lost` if there is no claim any more."""
        worker, next_beat = self.worker, 0.0
        with worker.start(self.cell, self.claim) as process:
            while (code := process.poll()) is None:
                if process.seconds >= next_beat:
                    next_beat = process.seconds + worker.limits.lease / BEATS
                    if not self._beat():
                        return claims.LOST, {}
                self._check_time(process)
                if worker.stopping or self.why or self.pruned:
                    process.stop()
                worker.wait()
            state, facts = self._end(code, process)
            worker.keep_log(self.claim, process)
            return state, {"seconds": round(process.seconds, 3), **facts}

    def _beat(self) -> bool:
        """Renews the claim with the run's progress; False if it is lost. A store that fails is asked again later."""
        lines = self._metrics()
        if self.worker.study.halving and not self.pruned:
            self.pruned = self._rung(lines)
        losses = [line for line in lines if LOSS in line][-1:]
        progress = {"steps": self.cell.config.get("steps")}
        progress |= (
            {"step": losses[0]["step"], "seconds": losses[0]["seconds"], "loss": losses[0][LOSS]} if losses else {}
        )
        try:
            return self.worker.ledger.renew(self.claim, progress)
        except (OSError, UserError) as e:
            self.worker.say(f"{self.cell.key}: the claim cannot be renewed: {e}")
            return True

    def _metrics(self) -> list[dict[str, Any]]:
        path = self.worker.study.run_path(self.cell.key) / METRICS
        try:
            return read_metrics(path) if exists(path) else []
        except (OSError, UserError):  # progress alone depends on it
            return []

    def _rung(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The last rung that the run has reached and its score, if the cell does not go on from there."""
        study = self.worker.study
        assert study.halving is not None
        name = "eval/loss" if study.metric == "nll" else f"eval/{study.metric}"
        scores = [line[name] for line in lines if name in line]
        for rung in halving.rungs(study.halving, len(scores)):
            score = scores[rung - 1]
            others = halving.record_score(study.path, rung, self.cell.key, score)
            if not halving.goes_on(score, others, study.halving, study.mode):
                return {"rung": rung, "score": score}
        return {}

    def _check_time(self, process: CellProcess) -> None:
        limits = self.worker.limits
        if limits.timeout and process.seconds > limits.timeout:
            self.why = f"it took longer than limits.timeout={limits.timeout:g} s"
        elif limits.stall and process.silent_seconds() > limits.stall:
            self.why = f"it has said nothing for limits.stall={limits.stall:g} s"

    def _end(self, code: int, process: CellProcess) -> tuple[str, dict[str, Any]]:
        """The state and facts for an exit code; a run that has ended counts, whatever it was asked."""
        summary = self.worker.study.run_path(self.cell.key) / SUMMARY
        if code == DONE and exists(summary):
            return claims.DONE, {"summary": {k: v for k, v in read_json(summary).items() if k != "samples"}}
        if self.why:
            return claims.FAILED, {"why": self.why}
        if self.pruned:
            return claims.PRUNED, self.pruned
        if code == STOPPED or (self.worker.stopping and code < 0):
            return claims.STOPPED, {}
        if code == DONE:
            return claims.FAILED, {"why": f"it ended with exit code 0 and without {SUMMARY}"}
        ending = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        return ENDS.get(code, claims.FAILED), {"why": f"{ending}: {process.last_line()}"}
