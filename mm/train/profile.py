"""A profile of some steps of a run: ``mm train RECIPE --profile 10-12``.

    steps 10 to 12 of every process ─torch.profiler─▶ RUN/profile/step-10-12/rank-0.json.gz   for Perfetto, Chrome
                                                   └▶ rank-0.txt: operators, share of collectives, share of data

The profiler looks on: batches, losses and updates are those of a run without it. Collectives are told from computation
by what ran when, so both the time that they took and the part of it that no computation hid can be said. Kernels say it
on GPUs (``nccl…``), on CPUs the operators and gloo's calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from mm.configure import RecipeError
from mm.terminal import console, paragraph
from mm.train.parallel import World

OPERATORS = 12
"""Rows of the table."""

Interval = tuple[float, float]


class Steps(NamedTuple):
    """Steps of a run, as its log counts them; both ends belong to them."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Steps:
        """``10-12``, or ``10``.

        Raises:
            RecipeError: it is written in another way, or the steps do not ascend from 1.
        """
        written = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", text.strip())
        if not written:
            raise RecipeError(f"--profile is {text!r}; write the first and the last step, such as 10-12")
        first, last = int(written[1]), int(written[2] or written[1])
        if not 1 <= first <= last:
            raise RecipeError(f"--profile is {text!r}; steps count from 1, and the first comes before the last")
        return cls(first, last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def check_within(self, begin: int, end: int) -> None:
        """Raise `RecipeError` unless the run is about to take them.

        Args:
            begin: steps that are done already; end: the last step of the stage that the run is in.
        """
        if not begin < self.first <= self.last <= end:
            others = (
                f"the stage that the run is in has steps {begin + 1} to {end} left" if begin < end else "none is left"
            )
            raise RecipeError(f"--profile {self}: the run cannot profile these steps, {others}")


@contextmanager
def profiling(steps: Steps | None, folder: Path, world: World, done: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called at the end of every step; without `steps` that does nothing.

    Args:
        folder: of the run. done: steps that were done before.
    """
    if steps is None:
        yield lambda: None
        return
    out = folder / "profile" / f"step-{steps}"

    def action(number: int) -> ProfilerAction:
        step = done + 1 + number
        if step == steps.last:
            return ProfilerAction.RECORD_AND_SAVE
        if steps.first <= step < steps.last:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == steps.first - 1 else ProfilerAction.NONE

    def save(profiler: profile) -> None:
        out.mkdir(parents=True, exist_ok=True)
        trace = out / f"rank-{world.rank}.json.gz"
        profiler.export_chrome_trace(str(trace))
        text = f"rank {world.rank} of {world.size}, steps {steps}\n{summary(profiler, world.device)}\n"
        (out / f"rank-{world.rank}.txt").write_text(text, encoding="utf-8")
        if world.is_first:
            where = f"{out} holds this and a trace of every process, for https://ui.perfetto.dev"
            console.print(paragraph(f"{text}{where}"), soft_wrap=True)

    on_gpu = [ProfilerActivity.CUDA] if world.device.type == "cuda" else []
    activities = [ProfilerActivity.CPU, *on_gpu]
    with profile(activities=activities, schedule=action, on_trace_ready=save, acc_events=True) as profiler:

        def end_step() -> None:
            profiler.step()
            if done + profiler.step_num == steps.last:
                world.barrier()  # writing takes longer on one process than on another, which is no step's time

        yield end_step


def summary(profiler: profile, device: torch.device) -> str:
    """What took the time of a profile: shares of data and collectives, and the dearest operators by their own time."""
    return "\n".join([*_shares(list(profiler.events() or ()), device), "", *_operators(profiler, device)])


def _shares(events: Sequence[Any], device: torch.device) -> Iterator[str]:
    on_host = [event for event in events if event.device_type == DeviceType.CPU]  # GPUs repeat annotations
    steps = [_interval(event) for event in on_host if event.name.startswith("ProfilerStep")]
    spent = length(steps)
    data = length(_interval(event) for event in on_host if event.is_user_annotation and event.name == "data")
    yield f"{spent / 1e6:.3f} s in {len(steps)} steps"
    yield f"{data / spent:6.1%}  waiting for data"
    collectives, computation = (_on_gpu if device.type == "cuda" else _on_cpu)(events)
    yield f"{length(collectives) / spent:6.1%}  collectives; {exposed(collectives, computation) / spent:.1%} not hidden"


def _on_gpu(events: Sequence[Any]) -> tuple[list[Interval], list[Interval]]:
    """When kernels of collectives ran, and when all others."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    collectives = [_interval(kernel) for kernel in kernels if kernel.name.startswith("nccl")]
    return collectives, [_interval(kernel) for kernel in kernels if not kernel.name.startswith("nccl")]


def _on_cpu(events: Sequence[Any]) -> tuple[list[Interval], list[Interval]]:
    """When gloo was at work, and when torch's operators were in other threads than gloo's.

    Operators only: what lies around them, such as the node of a backward, may be waiting for gloo.
    """
    collectives = [event for event in events if event.name.startswith("gloo:")]
    threads = {event.thread for event in collectives}
    operators = [event for event in events if event.name.startswith("aten::") and event.thread not in threads]
    return [_interval(event) for event in collectives], [_interval(event) for event in operators]


def _operators(profiler: profile, device: torch.device) -> Iterator[str]:
    on_gpu = device.type == "cuda"

    def own(row: Any) -> float:
        return row.self_device_time_total if on_gpu else row.self_cpu_time_total

    rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CPU and not row.is_user_annotation]
    total = sum(map(own, rows)) or 1.0
    title = f"operator, by its own time on the {'GPU' if on_gpu else 'CPU'}"
    yield f"{title:52} {'share':>7} {'ms':>10} {'calls':>8}"
    for row in sorted(rows, key=own, reverse=True)[:OPERATORS]:
        yield f"{row.key[:52]:52} {own(row) / total:7.1%} {own(row) / 1e3:10.2f} {row.count:8}"


def _interval(event: Any) -> Interval:
    """In microseconds."""
    return event.time_range.start, event.time_range.end


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals as ascending ones that do not touch."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """Of the union: what several cover counts once."""
    return sum(end - start for start, end in merged(intervals))


def exposed(intervals: Sequence[Interval], hiding: Sequence[Interval]) -> float:
    """Length of what the first cover and the others do not: |A ∖ B| = |A ∪ B| − |B|."""
    return length([*intervals, *hiding]) - length(hiding)
