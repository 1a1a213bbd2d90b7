"""When something goes wrong: hangs show where every process stands, and skipped steps name their samples.

step done ──▶ Watchdog.feed() ──… nothing for `watchdog` minutes …──▶ stacks of all threads: terminal, RUN/stacks/
gradient not finite, nothing with loss ──▶ no update; the step and its samples in ledger.jsonl
a GPU's memory runs out ──▶ what to ask `mm estimate`
"""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mm.packing.batch import Batch
from mm.terminal import errors, paragraph
from mm.train.dataset import PlannedData
from mm.train.ledger import Ledger, Sparing
from mm.train.parallel import World
from mm.train.stages import RunError

SKIPPED_IN_A_ROW = 5


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


class Cause(NamedTuple):
    """Why an update is skipped, as an event says it, and what can be done about it."""

    event: str
    remedy: str


NOT_FINITE = Cause("the gradient is not finite", "lower optim.lr, raise schedule.warmup, or look at the samples")
NO_WEIGHT = Cause(
    "nothing in the batch bears loss",
    "look at the broken samples, at `loss:` in the cards and at the weights of the sources and of the objective",
)


class Skips:
    """Steps whose update was skipped: counted, logged, named in the ledger, and not without end.

    The counts continue from what a resumed run had reported, as those of broken samples do.

    Args:
        reports: the lines of ``metrics.jsonl`` of the steps of the stage that are done.
        logs: whether this process logs them; one does.
    """

    def __init__(
        self, ledger: Ledger, data: PlannedData, reports: Sequence[Mapping[str, Any]] = (), *, logs: bool
    ) -> None:
        self._ledger, self._data = ledger, data
        self._log = Sparing("skipped updates", ledger.path) if logs else None
        self._skipped = int(sum(line.get("skipped_updates", 0) for line in reports))
        self._in_a_row = int(reports[-1].get("skipped_in_a_row", 0)) if reports else 0
        self._unreported = 0
        self._cause: Cause | None = None

    def add(self, step: int, cause: Cause | None, batches: Sequence[Batch]) -> None:
        """Count a step, done or skipped for a cause.

        Raises:
            RunError: too many were skipped in a row.
        """
        if cause is None:
            self._in_a_row = 0
            return
        self._cause = cause
        self._in_a_row += 1
        self._skipped += 1
        self._unreported += 1
        event = f"step {step}: {cause.event}, the update was skipped"
        self._ledger.note(event, samples=samples_of((batch.rows for batch in batches), self._data))
        if self._log is not None:
            self._log.log(event)
        if self._in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(f"{self._in_a_row} updates in a row were skipped, up to step {step}: {_explained(cause)}")

    def check_end(self, steps: int) -> None:
        """Raise `RunError` if none of all `steps` of a stage has made an update: it has learned nothing."""
        why = f", at last because {_explained(self._cause)}" if self._cause else f": see {self._ledger.path}"
        if self._skipped and self._skipped == steps:
            raise RunError(f"none of the {steps} steps has made an update{why}")

    def figures(self) -> dict[str, float]:
        """``skipped_updates`` since the last report, and ``skipped_in_a_row`` up to now if the last one was."""
        since, self._unreported = self._unreported, 0
        in_a_row: dict[str, float] = {"skipped_in_a_row": self._in_a_row} if self._in_a_row else {}
        return {"skipped_updates": since, **in_a_row}


def _explained(cause: Cause) -> str:
    return f"{cause.event}; {cause.remedy}: RUN/ledger.jsonl, mm inspect RUN --step N"


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
