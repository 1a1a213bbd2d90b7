"""Where the time of a step goes, on the clock of the device that spends it.

    data ─▶ sync ─▶ (forward ─▶ backward) per micro-batch ─▶ optimizer     the rest: counting, logging, Python between

``data``: until this process has its micro-batches. ``sync``: the reduction with which every step begins, that is, until
the slowest process has come as far. Communication is no phase of its own: FSDP2 gathers weights while it computes, and
no clock of the host could tell that from forward and backward, which hold it. See docs/meters.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, get_args

import torch

Phase = Literal["data", "sync", "forward", "backward", "optimizer"]

PHASES: tuple[Phase, ...] = get_args(Phase)


class Clock(Protocol):
    """Seconds by phase, summed up since they were last taken."""

    def timed(self, phase: Phase) -> AbstractContextManager[None]:
        """Counts the time inside for a phase. Nothing is waited for."""
        ...

    def take(self) -> dict[Phase, float]:
        """The sums, which start afresh. Waits for the device."""
        ...


def clock_of(device: torch.device) -> Clock:
    """The clock for steps that compute on this device."""
    return StreamClock() if device.type == "cuda" else HostClock()


class HostClock:
    """The processor's: what is called has been done when it returns."""

    def __init__(self) -> None:
        self._seconds = _nothing()

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def take(self) -> dict[Phase, float]:
        taken, self._seconds = self._seconds, _nothing()
        return taken


class StreamClock:
    """A GPU's: from when its stream comes to the beginning of a phase until it comes to its end.

    The host runs ahead of the GPU, and its clock would count kernels wherever something waits for them. Waiting for
    data counts here as far as the GPU had nothing left to do. Steps record events, which are read when the sums are
    taken.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._spans.append((phase, start, end))

    def take(self) -> dict[Phase, float]:
        seconds = _nothing()
        if self._spans:
            self._spans[-1][2].synchronize()
        for phase, start, end in self._spans:
            seconds[phase] += start.elapsed_time(end) / 1e3
        self._spans = []
        return seconds


def _nothing() -> dict[Phase, float]:
    return dict.fromkeys(PHASES, 0.0)
