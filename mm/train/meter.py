"""The running figures of a run, and where they go.

    batches, losses, FLOPs, seconds ─▶ Meter: sums of a process ─one reduction─▶ figures ─▶ terminal, JSONL, TensorBoard

Everything is kept as a sum, so that the mean over steps, micro-batches and processes is one division at the end: the
loss of a modality is Σwℓ / Σw over all its labels and never a mean of means.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.profiler import record_function

from mm import terminal
from mm.terminal import Console
from mm.train.clock import PHASES, Clock, HostClock, Phase
from mm.train.memory import Memory

# ----------------------------------------------------------------------------------------------------------- FLOPs

WEIGHTS = "weights/"
"""What figures about the weights of tokens begin with, see `mm.objectives.next_token.weight_sums`."""

PARTS: tuple[str, ...] = ("encoders", "adapters", "quantiser", "decoder", "head", "judges")
"""Where the FLOPs go, in the order of the forward. A part is named ``decoder``, or ``encoders.image`` per modality."""

DATASHEET_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\b(H200|GH200)\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\b(H100|H800)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bMI300X\b", 1307e12),
)
"""Dense bf16 FLOP/s with float32 accumulation by device name, from the makers' data sheets. The first match counts."""


class Peak(NamedTuple):
    """What a device could do: FLOP/s, where the number is from, and what the share of it that is reached is called."""

    flops: float
    origin: str
    figure: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of a device for products in `dtype`: the data sheet's for known GPUs in 16 bits, else measured on the spot.

    A share of a measured peak is another thing than the MFU of the literature, so it has another name.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        flops = datasheet_flops(name)
        if flops is not None:
            return Peak(flops, f"{name}, data sheet", "mfu")
    flops = measured_flops(device, dtype)
    return Peak(flops, f"{device.type}, measured by a {str(dtype).removeprefix('torch.')} product", "mfu_of_measured")


def datasheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that its driver gives, or None for one that is not in the table."""
    return next((flops for pattern, flops in DATASHEET_FLOPS if re.search(pattern, name)), None)


def measured_flops(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """FLOP/s of the fastest of some square matrix products; some 0.2 s on a CPU of today."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.ones(2, size, size, dtype=dtype, device=device).unbind()
    fastest = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        float(torch.mm(left, right)[0, 0])  # reading a value waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def training_factors(trained: Mapping[str, bool]) -> dict[str, int]:
    """FLOPs of forward and backward, in units of the forward, of every part of a model.

    A layer's product costs 1 in the forward, 1 more for the gradient of its input and 1 more for that of its weight. So
    a part that trains costs 3; a frozen one that passes gradients on to a part before it 2; one with nothing that
    trains before it 1. Recomputed activations do not count (Chowdhery et al. 2022, appendix B), and the first layer
    that trains counts 3 although its input needs no gradient, as is usual.

    Args:
        trained: whether parameters train, by part: ``encoders.image``, ``adapters.image``, …, ``decoder``, ``head``.
    """
    return {
        part: 3 if trains else 2 if any(trained[other] for other in trained if _feeds(other, part)) else 1
        for part, trains in trained.items()
    }


def _feeds(part: str, other: str) -> bool:
    """Whether the output of `part` reaches `other`."""
    kind, _, modality = part.partition(".")
    other_kind, _, other_modality = other.partition(".")
    same_stream = not other_modality or modality == other_modality
    return PARTS.index(kind) < PARTS.index(other_kind) and same_stream


# ---------------------------------------------------------------------------------------------------------- figures


class Meter:
    """Sums over the steps since the last report, of this process.

    Args:
        losses: all losses that can occur, the same on every process: ``total``, ``modality/text``, ``source/a``, …
        factors: see `training_factors`.
        peak: what one device could do.
        reduce: sums a list of numbers over all processes, such as `World.sum`; one process needs none.
        tokens: real tokens that all processes together have seen so far, from the checkpoint of a resumed run.
        clock: tells the time of phases, see `mm.train.clock`.
        memory: of this process; None leaves memory out.
        largest: takes the largest of each number over all processes, such as `World.max`.
    """

    def __init__(
        self,
        losses: Sequence[str],
        factors: Mapping[str, int],
        peak: Peak,
        reduce: Callable[[list[float]], list[float]] = list,
        tokens: int = 0,
        clock: Clock | None = None,
        memory: Memory | None = None,
        largest: Callable[[list[float]], list[float]] = list,
    ) -> None:
        self.tokens = tokens
        self._clock = clock or HostClock()
        self._names = tuple(losses)
        self._factors = dict(factors)
        self._peak = peak
        self._reduce = reduce
        self._memory = memory
        self._largest = largest
        self._reset()

    def _reset(self) -> None:
        self._losses = {name: torch.zeros(2, dtype=torch.float64) for name in self._names}
        self._flops = dict.fromkeys(PARTS, 0.0)
        self._real = self._capacity = self._steps = self._updates = 0
        self._norm: float | Tensor = 0.0
        self._rate = math.nan
        self._started = time.perf_counter()

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Counts the time inside for a phase of the step, which a profile shows by this name too."""
        with record_function(phase), self._clock.timed(phase):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside (saving, validation) out of everything."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def add_batch(self, real: int, capacity: int, flops: Mapping[str, float]) -> None:
        """Count a micro-batch: its tokens that belong to a sample, all its tokens, and its forward FLOPs by part."""
        self._real += real
        self._capacity += capacity
        for part, forward in flops.items():
            self._flops[part.partition(".")[0]] += forward * self._factors[part]

    def add_losses(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Count (Σwℓ, Σw) of a micro-batch by name. Stays on the device; nothing is waited for.

        Raises:
            KeyError: a name that the meter was not made for, which other processes could not reduce.
        """
        for name, pair in sums.items():
            if name not in self._losses:
                raise KeyError(f"no loss is called {name!r}; there are {', '.join(self._names)}")
            added = torch.stack(pair).detach().double()
            self._losses[name] = self._losses[name].to(added.device) + added

    def end_step(self, gradient_norm: float | Tensor | None, learning_rate: float) -> None:
        """Count a step, with the norm of the global gradient before clipping; None if it has computed none."""
        self._steps += 1
        self._rate = learning_rate
        if gradient_norm is not None:
            self._updates += 1
            self._norm = self._norm + gradient_norm

    def report(self) -> dict[str, float]:
        """Figures over the steps since the last report, of all processes together; every process takes part.

        ``loss`` (of ``total``) and ``loss/NAME`` in nats per unit of weight; a loss without labels is left out
        ``gradient_norm`` mean over the steps that computed one; ``learning_rate`` of the last step
        ``tokens`` real tokens since the start of the run; ``tokens_per_second`` real; ``fill`` real / all
        ``seconds_per_step``; ``time/PHASE`` and ``time/rest`` shares of them, mean over processes, see `mm.train.clock`
        ``flops_per_second`` of all processes; ``mfu`` or ``mfu_of_measured`` share of the peak (see `device_peak`)
        ``flops/PART`` shares of the FLOPs
        ``memory/peak`` bytes, of the process that has needed most; of them ``memory/parameters``, ``memory/gradients``
        and ``memory/optimizer``, and ``memory/rest``: activations and workspace, on a CPU all of Python too

        Raises:
            ValueError: no step was counted.
        """
        if not self._steps:
            raise ValueError("a report needs at least one step; call end_step after each")
        # These wait for the device, so they come before reading the time.
        losses = {name: pair.tolist() for name, pair in self._losses.items()}
        phases = self._clock.take()
        sums = {
            "processes": 1.0,
            "norm": float(self._norm) / max(self._updates, 1),
            "seconds": time.perf_counter() - self._started,
            **{f"seconds/{phase}": spent for phase, spent in phases.items()},
            "real": float(self._real),
            "capacity": float(self._capacity),
            **{f"flops/{part}": flops for part, flops in self._flops.items()},
            **{f"weighted/{name}": weighted for name, (weighted, _) in losses.items()},
            **{f"weight/{name}": weight for name, (_, weight) in losses.items()},
        }
        sums = dict(zip(sums, self._reduce(list(sums.values())), strict=True))
        self.tokens += int(sums["real"])
        figures = _figures(sums, self._names, self._steps, self._peak)
        if not self._updates:
            del figures["gradient_norm"]
        figures |= {"learning_rate": self._rate, "tokens": self.tokens}
        if self._memory:
            figures |= _memory_figures(self._memory, self._largest)
        self._reset()
        return figures


def _memory_figures(memory: Memory, largest: Callable[[list[float]], list[float]]) -> dict[str, float]:
    """The peak and what is held all the time, each of the process with most of it."""
    peak, *held = largest([float(memory.peak()), *map(float, memory.held.values())])
    parts = {f"memory/{part}": size for part, size in zip(memory.held, held, strict=True)}
    if parts:
        parts["memory/rest"] = max(0.0, peak - sum(held))
    return {"memory/peak": peak, **parts}


def figure_name(name: str) -> str:
    """What the figure of a pair of sums is called: a loss, or something about the weights of tokens."""
    return "loss" if name == "total" else name if name.startswith(WEIGHTS) else f"loss/{name}"


def _figures(sums: Mapping[str, float], names: Sequence[str], steps: int, peak: Peak) -> dict[str, float]:
    """The figures that follow from sums over steps and processes, see `Meter.report`."""
    seconds = sums["seconds"] / sums["processes"]
    flops = {part: sums[f"flops/{part}"] for part in PARTS}
    all_flops = sum(flops.values())
    shares = {phase: sums[f"seconds/{phase}"] / sums["seconds"] for phase in PHASES}
    means = {name: sums[f"weighted/{name}"] / sums[f"weight/{name}"] for name in names if sums[f"weight/{name}"]}
    if means.get("weights/mean", 1.0) == means.get("weights/square", 1.0) == 1.0:  # all tokens alike: nothing to tell
        means = {name: mean for name, mean in means.items() if not name.startswith(WEIGHTS)}
    return {
        **{figure_name(name): mean for name, mean in means.items()},
        "gradient_norm": sums["norm"] / sums["processes"],
        "tokens_per_second": sums["real"] / seconds,
        "fill": sums["real"] / sums["capacity"] if sums["capacity"] else math.nan,
        "seconds_per_step": seconds / steps,
        **{f"time/{phase}": share for phase, share in shares.items()},
        "time/rest": max(0.0, 1 - sum(shares.values())),
        "flops_per_second": all_flops / seconds,
        peak.figure: all_flops / (sums["seconds"] * peak.flops),
        **{f"flops/{part}": part_flops / all_flops for part, part_flops in flops.items() if part_flops},
    }


# ---------------------------------------------------------------------------------------------------------- writers


class Writer(Protocol):
    """Somewhere that figures go. Only the first process has any."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``metrics.jsonl``: one object a line, ``{"step": 10, "loss": 3.2, …}``; what is not finite is null.

    Args:
        first_step: the next step that will be written. Its lines and later ones, and a line that a killed run left
            half-written, are cut, so that a run that was resumed from an earlier checkpoint has each step once.

    Raises:
        ValueError: a line within is not JSON with a step; names the file and the line.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            os.truncate(path, sum(length for length, _ in lines_before(path, first_step)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        broken = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
        finite = {**figures, **dict.fromkeys(broken)}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def lines_before(path: Path, first_step: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(bytes, object) of the whole lines of a `JsonLines` file before the first of `first_step` or later.

    Raises:
        ValueError: a line is not JSON with a step; names the file and the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
                step = found["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no JSON object with a `step`; repair or move the file"
                ) from error
            if step >= first_step:
                return
            yield len(line), found


class TensorBoard:
    """Event files that TensorBoard reads. Events of `first_step` and later, of a killed run, are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # seconds to import

        self._events = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Progress:
    """A line of figures per report and, on a terminal, a bar below them with the time that is left.

    Args:
        total: steps of the run.
        done: steps that were done before.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        console = console or terminal.console
        columns = (
            "step",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        self._total = total
        self._bar = terminal.Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("steps", total=total, completed=done)
        self._bar.start()

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.advance(self._task)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._bar.console.print(terminal_line(step, self._total, figures), soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class _Column(NamedTuple):
    """How a figure appears in a line of the terminal: text before, `format` of scale × value, text after."""

    before: str
    scale: float
    format: str
    after: str = ""


_COLUMNS = {
    "loss": _Column("loss ", 1, ".4f"),
    "loss/routers": _Column("loss of routers ", 1, ".4f"),
    "validation_loss": _Column("validation loss ", 1, ".4f"),
    "router_agreement": _Column("routers agree ", 100, ".1f", " %"),
    "tokens_without_expert": _Column("without expert ", 100, ".1f", " %"),
    "validation/psnr": _Column("PSNR ", 1, ".2f", " dB"),
    "validation/utilisation": _Column("codes used ", 100, ".1f", " %"),
    "learning_rate": _Column("lr ", 1, ".2e"),
    "gradient_norm": _Column("norm ", 1, ".3g"),
    "skipped_updates": _Column("skipped updates ", 1, ".0f"),
    "data/broken": _Column("broken samples ", 1, ",.0f"),
    "validation/broken": _Column("broken in validation ", 1, ",.0f"),
    "tokens_per_second": _Column("", 1, ",.0f", " tok/s"),
    "fill": _Column("fill ", 100, ".1f", " %"),
    "time/data": _Column("data ", 100, ".1f", " %"),
    "flops_per_second": _Column("", 1e-12, ".3g", " TFLOP/s"),
    "memory/peak": _Column("memory ", 1e-9, ".3g", " GB"),
    "mfu": _Column("MFU ", 100, ".1f", " %"),
    "mfu_of_measured": _Column("", 100, ".0f", " % of a measured product"),
}


ONLY_IF_ANY = ("skipped_updates", "data/broken", "validation/broken")
"""Columns that are left out where they are 0."""


def terminal_line(step: int, total: int, figures: Mapping[str, float]) -> str:
    """``step  120/2000  loss 3.2140  lr 3.00e-04  norm 0.81  12,300 tok/s  …``: the figures that a person watches."""
    shown = [
        f"{column.before}{column.scale * figures[name]:{column.format}}{column.after}"
        for name, column in _COLUMNS.items()
        if name in figures and (figures[name] or name not in ONLY_IF_ANY)
    ]
    return "  ".join([f"step {step:>{len(str(total))}}/{total}", *shown])
