"""Being asked to save or to stop, by a signal or by the clock.

    SIGTERM, time_limit ─▶ save and stop        SIGUSR1 ─▶ save and go on

A signal reaches one process and all must act at the same step, so every process votes in the first reduction of each
step, and what any has voted for happens at the end of that step. A signal that comes later counts in the next.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mm.configure import RecipeError

LEAVING = 5.0
"""Seconds for closing files and leaving the process group, and for what slows a step on a machine with other work."""

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class Stopped(SystemExit):
    """The run was asked to stop, and has saved. As it ends with exit status 0, so does a program that does not care."""

    def __init__(self) -> None:
        super().__init__(0)


def seconds_of(duration: str) -> float:
    """Seconds of ``11h30m``, ``90s``, ``2d12h``.

    Raises:
        RecipeError: it is written in another way, or is zero.
    """
    parts = re.fullmatch("".join(rf"(?:(\d{{1,9}}){unit})?" for unit in UNITS), duration.strip())
    seconds = (
        sum(int(count or 0) * size for count, size in zip(parts.groups(), UNITS.values(), strict=True)) if parts else 0
    )
    if not seconds:
        raise RecipeError(f"time_limit is {duration!r}; write days, hours, minutes and seconds such as 11h30m or 90s")
    return seconds


class Interrupts:
    """What this process was asked for.

    Args:
        limit: seconds from now within which the run is to have stopped; None for as long as it takes
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit, self._started = limit, time.monotonic()
        self._voted: float | None = None
        self._longest = 0.0
        self._stop = False
        self._asked = self._answered = 0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take the signals instead of dying of them. Before and after, a run has nothing that a kill would lose."""
        self._voted = None
        handlers = {signal.SIGTERM: self._on_stop, signal.SIGUSR1: self._on_save}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def votes(self, saving: float) -> tuple[float, float]:
        """This process's votes for stopping and for saving, asked for once a step.

        Args:
            saving: seconds that a save would take.
        """
        now = time.monotonic()
        if self._voted is not None:
            self._longest = max(self._longest, now - self._voted)
        self._voted = now
        # This step is still to be done. If after it another one would not fit, it is the last.
        needed = 2 * self._longest + saving + LEAVING
        late = self._limit is not None and now - self._started + needed > self._limit
        new, self._answered = self._asked - self._answered, self._asked
        return float(self._stop or late), float(new)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._asked += 1


def leave_to_the_run(worker: int = 0) -> None:
    """Let a process that loads data ignore the signals: they reach the whole process group, and the run needs its data
    until it has saved. It ends with the process that started it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
