"""The packs of a plan on disk: one file a window, written once, read by loader workers and by who plans on.

000007.000000012288-000000014336.npz    window 7 holds packs 12288 to 14335: listing a folder is reading its index
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mm.packing.streams import Cursor

OPEN_WINDOWS = 8  # kept in memory by a reader
WINDOW_NAME = re.compile(r"(\d{6,})\.(\d{12,})-(\d{12,})(\.last)?\.npz")


class PlanDamaged(ValueError):
    """A window file is missing from the folder."""


class PlannedSample(NamedTuple):
    """A sample of a pack, see `PackRows`."""

    source: int
    shard: int
    row: int
    stamp: int
    choice: int
    epoch: int
    length: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class PackRows:
    """The k samples of a pack, in order.

    source: (k,) number of the source; shard, row: (k,) shard of it and row there; choice, epoch: (k,) as drawn
    stamp: (k,) uint32 of what the rows of the shard were when this was planned; 0 if they cannot change
    length: (k,) tokens in the pack; truncated: (k,) bool, whether the text is cut to that length
    """

    source: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    stamp: np.ndarray
    choice: np.ndarray
    epoch: np.ndarray
    length: np.ndarray
    truncated: np.ndarray

    def samples(self) -> list[PlannedSample]:
        """One by one."""
        columns = (getattr(self, name).tolist() for name in PlannedSample._fields)
        return [PlannedSample(*values) for values in zip(*columns, strict=True)]


class Window(NamedTuple):
    """The p packs of a window.

    rows: (k,) `ROW`; starts: (p + 1,) first row of every pack
    costs: (p, 2) FLOPs of encoders and decoder; media: (p, M) media tokens of each quantity
    """

    rows: np.ndarray
    starts: np.ndarray
    costs: np.ndarray
    media: np.ndarray


class ReadTo(NamedTuple):
    """How far a plan has read a source, and what that is a position in.

    shards, rows: how many the source had; no rows where they were not counted
    """

    cursor: Cursor
    shards: int
    rows: int | None


class WindowFile(NamedTuple):
    """A window on disk; its name says which packs it holds, so that listing a folder is reading its index."""

    path: Path
    first: int
    stop: int
    last: bool


class PlanReader:
    """Packs of a plan that were made so far. Small and picklable: it travels into loader workers, which never plan."""

    def __init__(self, folder: str | Path, packs_per_batch: int) -> None:
        self.folder = Path(folder)
        self.packs_per_batch = packs_per_batch
        self._windows: list[WindowFile] = []
        self._loaded: dict[int, Window] = {}
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanReader, (self.folder, self.packs_per_batch)

    def refresh(self) -> None:
        """Looks for windows that another process has added."""
        names = sorted(path.name for path in self.folder.iterdir() if WINDOW_NAME.fullmatch(path.name))
        for name in names[len(self._windows) :]:
            match = WINDOW_NAME.fullmatch(name)
            assert match is not None
            number, first, stop = (int(group) for group in match.groups()[:3])
            if number != len(self._windows) or first != self.planned:
                raise PlanDamaged(
                    f"{self.folder}: window {len(self._windows)} from pack {self.planned} on is missing; found {name}. "
                    "Restore the file, or delete the folder to plan anew (earlier checkpoints cannot be resumed then)"
                )
            self._windows.append(WindowFile(self.folder / name, first, stop, match[4] is not None))

    @property
    def planned(self) -> int:
        """Number of packs made so far."""
        return self._windows[-1].stop if self._windows else 0

    @property
    def ended(self) -> bool:
        """Whether no further packs will ever be made."""
        return bool(self._windows) and self._windows[-1].last

    def pack(self, number: int) -> PackRows:
        """The samples of a pack.

        Raises:
            IndexError: the pack was not planned (yet).
        """
        window, within = self._find(number)
        samples = window.rows[window.starts[within] : window.starts[within + 1]]
        return PackRows(**{field.name: samples[field.name] for field in fields(PackRows)})

    def costs(self, packs: Sequence[int]) -> np.ndarray:
        """(P, 2) FLOPs of each pack in the encoders and in the decoder; 0 for an empty pack (-1).

        Raises:
            IndexError: a pack was not planned (yet).
        """
        costs = np.zeros((len(packs), 2))
        for place, number in enumerate(packs):
            if number >= 0:
                window, within = self._find(number)
                costs[place] = window.costs[within]
        return costs

    def media_tokens(self, pack: int) -> np.ndarray:
        """(M,) tokens of each quantity in a pack."""
        window, within = self._find(pack)
        return window.media[within]

    def read_to(self, packs: int) -> dict[str, ReadTo]:
        """How far the sources were read in the windows of the first `packs` packs: where a next stage may start.

        Samples of the last of these windows beyond the packs, and those carried over, are then passed over.
        """
        parts = json.loads((self.folder / "plan.json").read_text())["parts"]
        windows = [window for window in self._windows if window.first < packs]
        if windows:
            with np.load(windows[-1].path, allow_pickle=False) as file:
                cursors = file["cursors"].tolist()
        else:
            cursors = [parts[f"{name}.start"] for name in parts["sources"]]
        return {
            name: ReadTo(Cursor(*cursor), parts[f"{name}.shards"], parts[f"{name}.rows"])
            for name, cursor in zip(parts["sources"], cursors, strict=True)
        }

    def batch(self, step: int) -> list[int]:
        """Pack numbers of a global batch; -1 fills up the last one.

        Raises:
            IndexError: some of its packs were not planned (yet).
        """
        return self.batch_from(step * self.packs_per_batch)

    def batch_from(self, first: int) -> list[int]:
        """Pack numbers of the global batch that begins with pack `first`, for runs whose batch size has changed."""
        stop = first + self.packs_per_batch
        if stop > self.planned:
            self.refresh()
        if not 0 <= first < self.planned or (stop > self.planned and not self.ended):
            raise IndexError(f"packs {first} to {stop - 1} of {self.folder}: {self._extent()}")
        return [number if number < self.planned else -1 for number in range(first, stop)]

    def _extent(self) -> str:
        if self.ended:
            return f"the plan ends after {self.planned} packs"
        return f"{self.planned} packs are planned; Plan.ensure makes more"

    def _find(self, pack: int) -> tuple[Window, int]:
        """The window of a pack, and its place there.

        Raises:
            IndexError: the pack was not planned (yet).
        """
        if pack >= self.planned:
            self.refresh()
        if not 0 <= pack < self.planned:
            raise IndexError(f"pack {pack} of {self.folder}: {self._extent()}")
        window = bisect_right(self._windows, pack, key=lambda window: window.stop)
        return self._load(window), pack - self._windows[window].first

    def _load(self, window: int) -> Window:
        """A window; the least recently used one makes room."""
        if window in self._loaded:
            self._loaded[window] = self._loaded.pop(window)
        else:
            with np.load(self._windows[window].path, allow_pickle=False) as file:
                self._loaded[window] = Window(**{name: file[name] for name in Window._fields})
            if len(self._loaded) > OPEN_WINDOWS:
                del self._loaded[next(iter(self._loaded))]
        return self._loaded[window]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete or not at all: written beside it, synced, then renamed."""
    temporary = path.with_name("unfinished.tmp")  # one writer at a time, so one name; a killed one's is overwritten
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
