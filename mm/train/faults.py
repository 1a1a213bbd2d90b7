"""When something goes wrong: hangs show where every process stands, and skipped steps name their samples.

step done ──▶ Watchdog.feed() ──… nothing for `watchdog` minutes …──▶ stacks of all threads: terminal, RUN/stacks/
gradient not finite ──▶ the step and its samples in ledger.jsonl
a GPU's memory runs out ──▶ what to ask `mm estimate`
"""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mm.packing.batch import Batch
from mm.terminal import errors, paragraph
from mm.train.dataset import PlannedData
from mm.train.parallel import World
from mm.train.records import Ledger
from mm.train.stages import RunError

NON_FINITE_IN_A_ROW = 5


class Watchdog:
    """Tells where this process stands when a step takes too long, again and again until one ends.

    A rank that hangs lets all others wait in a collective, so every rank tells: the one that does not wait in one is
    the culprit.
    """

    def __init__(self, folder: Path, rank: int, minutes: float) -> None:
        """`minutes`: 0 for never."""
        self._path = folder / "stacks" / f"rank-{rank}.txt"
        self._title = f"rank {rank}: no step has ended for {minutes:g} minutes; its threads stand at:"
        self._seconds = 60 * minutes
        self._fed, self._ended = threading.Event(), False

    def __enter__(self) -> Self:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        self._fed.set()

    def feed(self) -> None:
        """A step is done: start waiting anew."""
        self._fed.set()

    def _watch(self) -> None:
        while not self._ended:
            if not self._fed.wait(self._seconds):
                self._tell()
            self._fed.clear()

    def _tell(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("w", encoding="utf-8") as file:
            file.write(f"{self._title}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        errors.print(paragraph(self._path.read_text(encoding="utf-8")), soft_wrap=True)


def samples_of(rows: Iterable[Tensor], data: PlannedData) -> list[str]:
    """Names of the samples of batches with these `Batch.rows`, as messages have them."""
    return [
        f"{data.names[source]}, {Path(data.samples[source].shards[shard]).name}, row {row}"
        for of_batch in rows
        for source, shard, row in of_batch.tolist()
        if source >= 0
    ]


class Skips:
    """Updates that a gradient that is not finite has prevented: named in the ledger, and not without end."""

    def __init__(self, ledger: Ledger, data: PlannedData) -> None:
        self._ledger, self._data = ledger, data
        self._in_a_row = 0

    def add(self, step: int, finite: bool, batches: Sequence[Batch]) -> None:
        """Count a step, done or skipped.

        Raises:
            RunError: too many were skipped in a row.
        """
        if finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        names = samples_of((batch.rows for batch in batches), self._data)
        self._ledger.note(f"step {step}: the gradient is not finite, the update was skipped", samples=names)
        if self._in_a_row >= NON_FINITE_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {self._in_a_row} steps in a row, up to step {step}; lower optim.lr, "
                "raise schedule.warmup, or look at the samples: RUN/ledger.jsonl, mm inspect RUN --step N"
            )


@contextmanager
def out_of_memory_explained(world: World) -> Iterator[None]:
    """Where a GPU's memory runs out, say what shows what takes it.

    Raises:
        RunError: in place of torch's error, whose first sentences it repeats.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{error}\n`mm estimate RECIPE --gpus {world.size} --gpu NAME` shows what takes the memory, the largest "
            "micro_batch that fits, and what each change would save: parallel.activations, packing.limits, …"
        ) from error
