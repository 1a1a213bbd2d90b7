"""Broken samples and other events of a run: logged as they occur, written to ``RUN/ledger.jsonl``, held to a limit.

batches ─▶ Ledger.add ─Σ over processes─▶ Ledger.count ─▶ data/samples, data/broken, data/broken_share
              │ names and reasons              └─ more than `data.max_broken`: the run stops
              ▼
      the log (the first few), ledger.jsonl (all)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from mm import terminal
from mm.data.labels import printable
from mm.packing.batch import Batch
from mm.train.meter import lines_before
from mm.train.recipe import DataOptions
from mm.train.stages import RunError

logger = terminal.logger(__name__)

LOGGED = 3
"""Events of a kind that a process logs one by one."""

SHOWN = 8
"""Broken samples that the error names."""

LONGEST = 300
"""Characters of an event in the log."""


class Tally(NamedTuple):
    """Samples that were read, and those of them that were broken."""

    samples: int = 0
    broken: int = 0

    @classmethod
    def reported(cls, reports: Sequence[Mapping[str, Any]]) -> Self:
        """What a run has reported, by the lines of its ``metrics.jsonl``."""
        return cls(*(int(sum(line.get(f"data/{name}", 0) for line in reports)) for name in cls._fields))

    def plus(self, other: Tally) -> Tally:
        return Tally(self.samples + other.samples, self.broken + other.broken)

    @property
    def share(self) -> float:
        return self.broken / self.samples if self.samples else 0.0


def reports_of(folder: Path, steps: range) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run that are about some of its steps."""
    metrics = folder / "metrics.jsonl"
    lines = [line for _, line in lines_before(metrics, steps.stop)] if metrics.exists() else []
    return [line for line in lines if line["step"] in steps]


class Sparing:
    """Logs the first few events of a kind by name; the others are in the ledger and in the figures."""

    def __init__(self, kind: str, ledger: Path) -> None:
        """`kind`: what the events are, in the plural."""
        self._kind, self._ledger = kind, ledger
        self._left = LOGGED

    def log(self, event: str) -> None:
        if self._left <= 0:
            return
        self._left -= 1
        logger.warning("%s", printable(event, LONGEST))
        if not self._left:
            logger.warning("further %s are counted in the figures and listed in %s", self._kind, self._ledger)


class Ledger:
    """``ledger.jsonl``, one object a line, and the count of broken samples of a stage.

    The count goes on where a resumed run had reported to, so that stopping and resuming forgives nothing.

    Args:
        reports: the lines of ``metrics.jsonl`` of the steps of the stage that are done.
        writes: of processes that share their streams one does.
    """

    def __init__(
        self, folder: Path, options: DataOptions, reports: Sequence[Mapping[str, Any]] = (), *, writes: bool = True
    ) -> None:
        self.path = folder / "ledger.jsonl"
        self._options = options
        self._writes = writes
        self._stage = Tally.reported(reports)
        self._unreported = Tally()
        self._last: list[str] = []
        self._log = Sparing("broken samples", self.path)
        self._validation: set[str] = set()
        self._validation_log = Sparing("broken validation samples", self.path)

    def add(self, batches: Sequence[Batch]) -> Tally:
        """Record the broken samples of a step of this process, and return how many samples that are."""
        if not self._writes:
            return Tally()
        for name, reason in (broken for batch in batches for broken in batch.broken):
            event = f"{name}: {reason}"
            self._last = [*self._last, event][-SHOWN:]
            self.note(event, sample=name, reason=reason)
            self._log.log(f"broken sample, replaced by padding: {event}")
        return _tally(batches)

    def add_validation(self, batches: Sequence[Batch]) -> Tally:
        """As `add`, of validation. Every validation reads the same samples, so that each is recorded once."""
        if not self._writes:
            return Tally()
        for name, reason in (broken for batch in batches for broken in batch.broken):
            if name not in self._validation:
                self._validation.add(name)
                self.note(f"validation: {name}: {reason}", sample=name, reason=reason, split="validation")
                self._validation_log.log(f"broken validation sample, left out: {name}: {reason}")
        return _tally(batches)

    def count(self, step: Tally) -> None:
        """Count a step's samples of all processes together.

        Raises:
            RunError: more are broken than the recipe allows. All processes raise it together.
        """
        self._unreported = self._unreported.plus(step)
        self._stage = self._stage.plus(step)
        self._check(max(self._stage.samples, self._options.max_broken_after))

    def check_end(self) -> None:
        """Raise `RunError` if more of all samples of the stage were broken than the recipe allows."""
        self._check(self._stage.samples)

    def _check(self, samples: int) -> None:
        broken, most = self._stage.broken, self._options.max_broken
        if not broken or broken / samples <= most:  # 0.29 * 100 is less than 29, and 29 / 100 is 0.29
            return
        last = "".join(f"\n  {event}" for event in self._last)
        raise RunError(
            f"{broken:,} of {self._stage.samples:,} samples of this stage were broken, and data.max_broken allows "
            f"{most:.4g} of {samples:,}. All are listed in {self.path}. Mend or drop them (`mm data drop`), or raise "
            f"data.max_broken, and repeat the command; the last ones of this process:{last or ' none'}"
        )

    def figures(self) -> dict[str, float]:
        """``data/samples`` and, of them, ``data/broken`` since the last report, and their share."""
        since, self._unreported = self._unreported, Tally()
        return {"data/samples": since.samples, "data/broken": since.broken, "data/broken_share": since.share}

    def note(self, event: str, **more: Any) -> None:
        """Write an event, if this process is one that writes."""
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event} | more) + "\n")


def _tally(batches: Sequence[Batch]) -> Tally:
    samples = sum(int((batch.rows[:, 0] >= 0).sum()) for batch in batches)
    return Tally(samples, sum(len(batch.broken) for batch in batches))
