"""The progress of a run and its speed: laps of a clock, and a progress bar."""

import time
from typing import TextIO

from tqdm import tqdm


class Clock:
    """The seconds of the run and its speed, measured in laps from one logged loss to the next."""

    def __init__(self, tokens_per_step: float, start: int):
        self.seconds_before = 0.0
        self.mean: float | None = None
        self._tokens = tokens_per_step
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None  # (step, time); pauses move the time forward
        self._last: tuple[int, float] | None = None

    def seconds(self) -> float:
        """The wall seconds of the run, including those before a resume."""
        return self.seconds_before + time.monotonic() - self._began

    def lap(self, step: int) -> float | None:
        """The tokens per second since the previous lap; None for the first lap, which contains the compilation."""
        now = time.monotonic()
        first, last = self._first or (step, now), self._last or (step, now)
        self.mean = self._rate(first, step, now)
        self._first, self._last = first, (step, now)
        return self._rate(last, step, now)

    def skip(self, seconds: float) -> None:
        """Excludes the last `seconds` from every rate."""
        self._first = self._first and (self._first[0], self._first[1] + seconds)
        self._last = self._last and (self._last[0], self._last[1] + seconds)

    def _rate(self, since: tuple[int, float], step: int, now: float) -> float | None:
        steps, seconds = step - since[0], now - since[1]
        return self._tokens * steps / seconds if self._tokens and steps > 0 and seconds > 0 else None


class Progress:
    """A tqdm bar on a terminal, and a printed line every few seconds elsewhere."""

    def __init__(self, total: int, start: int, every_seconds: float, stream: TextIO):
        self._stream, self._every, self._total = stream, every_seconds, total
        self._terminal = stream.isatty()
        self._bar = tqdm(
            total=total, initial=start, unit="step", file=stream, dynamic_ncols=True, disable=not self._terminal
        )
        self._start, self._began = start, time.monotonic()
        self._next = 0.0

    def show(self, step: int, loss: float, tokens_per_s: float | None) -> None:
        """Moves the bar to `step`; where there is not a terminal, prints a line if `every_seconds` have passed."""
        rate = f"{tqdm.format_sizeof(tokens_per_s)} tokens/s" if tokens_per_s else ""
        if self._terminal:
            self._bar.set_postfix_str(f"loss {loss:.4f}  {rate}".rstrip(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() >= self._next or step >= self._total:
            self._next = time.monotonic() + self._every
            self._line(step, loss, rate)

    def _line(self, step: int, loss: float, rate: str) -> None:
        done, elapsed = step - self._start, time.monotonic() - self._began
        left = f"ETA {tqdm.format_interval(elapsed / done * (self._total - step))}" if done > 0 else ""
        parts = [f"step {step}/{self._total}", f"loss {loss:.4f}", rate, left]
        print("  ".join(p for p in parts if p), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Prints `text` above the bar."""
        if self._terminal:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Closes the bar, which stays on the screen."""
        self._bar.close()
