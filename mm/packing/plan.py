"""Which samples share which pack: an append-only artefact on disk, made ahead of training and never recomputed.

    sources ──exact quotas──▶ window ──policy──▶ packs ──order──▶ 000007.000000012288-000000014336.npz
       ▲                         ▲                  │
       └── cursors, debts        └── worst packs ◀──┘        kept in the window file: any process can go on from it

Steps run over the concatenated packs of all windows: global batch i is packs ``[i·B, (i + 1)·B)``. The batches depend
on the sources, the options and the seed alone: not on the number of ranks or workers, nor on when or where windows are
made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from filelock import FileLock

from mm.data.passes import bar
from mm.packing.balance import side_by_side
from mm.packing.fit import POLICIES, Packs, lower_bound
from mm.packing.hashing import shuffled
from mm.packing.options import PackingOptions
from mm.packing.source import DROPPED, FILTERED, MISSING, QUANTITIES, Rows, Source, Unit
from mm.packing.streams import ROW, Cursor, Stream, Taken, row_table

logger = logging.getLogger(__name__)

__all__ = [
    "DROPPED",
    "FILTERED",
    "MISSING",
    "QUANTITIES",
    "Cursor",
    "PackRows",
    "PackingOptions",
    "Plan",
    "PlanChanged",
    "PlanReader",
    "PlannedSample",
    "ReadTo",
    "Rows",
    "Source",
    "Statistics",
    "Unit",
]

FORMAT = 3
"""Changes with anything that gives other packs or files for the same inputs."""

CARRIED = 64
"""One pack in this many, the least full, is opened again in the next window."""

SKEW, SKEW_TOKENS = 2e-4, 5_000_000
"""What is carried into the next window may move the share of a source by 0.02 percentage points of a window, or of this
many tokens if the window is smaller."""

Flops = Callable[[np.ndarray], np.ndarray]
"""(n,) FLOPs of documents of (n,) tokens in the decoder."""

SHARE_UNIT = 2**32
OPEN_WINDOWS = 8  # kept in memory by a reader
WINDOW_NAME = re.compile(r"(\d{6,})\.(\d{12,})-(\d{12,})(\.last)?\.npz")


class PlanChanged(ValueError):
    """The folder holds a plan for other inputs. Going on would repeat some samples and leave out others."""


class PlanDamaged(ValueError):
    """A window file is missing from the folder."""


def linear(lengths: np.ndarray) -> np.ndarray:
    """FLOPs of documents, in those of a token, where attention costs nothing."""
    return lengths.astype(np.float64)


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


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """What was planned of a source; samples that wait for the next window are not counted.

    asked: share of the plan's unit by the recipe; share: of all tokens; sample_share: of all samples
    epochs: how often its rows were passed over, see `Stream.passes`
    items, media_tokens: by quantity; dropped: rows by reason
    """

    samples: int
    tokens: int
    asked: float
    share: float
    sample_share: float
    epochs: float
    truncated: int
    items: dict[str, int]
    media_tokens: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was planned so far.

    fill: tokens / (packs · capacity)
    lower_bound: packs that no packing could do without, max(ΣL / capacity, Σn / limit)
    ended_by: None while there is more to plan, else the source that ran dry, or "all sources"
    """

    packs: int
    samples: int
    tokens: int
    fill: float
    lower_bound: float
    ended_by: str | None
    sources: dict[str, SourceStatistics]


@dataclass
class State:
    """Where planning stands after a window, for S sources, M quantities and R reasons. Saved with the window.

    cursors: (S, 4) positions of the streams
    debts: (S,) tokens, or samples, still owed to each source; remainders: (S,) and parts of one, in units of the shares
    carried: (k,) `row_table` of samples for the next window
    ended: 0 while there is more, 1 + the source that ran dry, or -1 if all did
    The rest are totals from the first window on.
    """

    cursors: np.ndarray
    debts: np.ndarray
    remainders: np.ndarray
    carried: np.ndarray
    ended: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    items: np.ndarray
    media_tokens: np.ndarray
    dropped: np.ndarray

    @classmethod
    def at_start(cls, cursors: Sequence[Cursor], quantities: int, reasons: int) -> Self:
        sources = len(cursors)
        zero = np.zeros(sources, np.int64)
        return cls(
            cursors=np.array(cursors, np.int64),
            debts=zero,
            remainders=zero,
            carried=np.empty(0, row_table(quantities)),
            ended=np.zeros((), np.int64),
            samples=zero,
            tokens=zero,
            truncated=zero,
            items=np.zeros((sources, quantities), np.int64),
            media_tokens=np.zeros((sources, quantities), np.int64),
            dropped=np.zeros((sources, reasons), np.int64),
        )


class Quotas(NamedTuple):
    """What a window gives to each of S sources.

    shares: (S,) float64 of the window, 0 for a source that has ended; debts, remainders: after it, as in `State`
    """

    shares: np.ndarray
    debts: np.ndarray
    remainders: np.ndarray


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


class Plan(PlanReader):
    """A plan that can be continued. Pickled, it becomes its `PlanReader`: workers need neither columns nor quotas.

    Weights are shares of the tokens, of the samples, or of passes over each source. Every window keeps them to half a
    sample a source, quotas being whole numbers whose remainders are carried on, and to `SKEW` for what waits for the
    next window. A plan with weights ends when the first source with a bound on its epochs runs dry. Without weights
    every source gets the share at which all end together, and the plan ends when all have. A source without any bound
    never ends.
    """

    def __init__(
        self,
        folder: Path,
        streams: Sequence[Stream],
        starts: Sequence[Cursor],
        options: PackingOptions,
        seed: int,
        shares: Sequence[int],
        budget: int,
        unit: Unit,
        flops: Flops,
        fingerprint: str,
    ) -> None:
        """Use `Plan.open`."""
        super().__init__(folder, options.packs_per_batch)
        self.options = options
        self.seed = seed
        self.fingerprint = fingerprint
        self.sources = [stream.source for stream in streams]
        self.weighted = self.sources[0].weight is not None
        self.quantities = self.sources[0].quantities
        self.unit: Unit = unit
        self._streams = streams
        self._starts = starts
        self._shares = shares
        self._budget = budget
        self._flops = flops
        self._planning = threading.Lock()
        self._ahead: threading.Thread | None = None
        self._limited = [number for number, name in enumerate(self.quantities) if name in options.limits]
        self._limits = np.array([options.limits[self.quantities[number]] for number in self._limited], np.int64)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        sources: Sequence[Source],
        options: PackingOptions,
        seed: int,
        epochs: float | None = None,
        start: Mapping[str, Cursor] | None = None,
        unit: Unit = "tokens",
        flops: Flops = linear,
        about: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Self:
        """The plan in a folder, created or continued. Several processes may hold it; one at a time plans.

        Args:
            epochs: for sources that do not say how often their rows are seen; None: endlessly.
            start: positions where sources begin, from `read_to` of an earlier stage's plan; the beginning if not named.
            unit: what weights are shares of: tokens; samples; or epochs, so that a source of weight 2 is passed over
                twice while one of weight 1 is once.
            flops: what documents cost in the decoder.
            about: what `flops` and `Rows.media_flops` are of, by names that a reader of `PlanChanged` understands.
            progress: show a bar while the rows of all sources are looked through.

        Raises:
            PlanChanged: the folder holds a plan for other inputs.
            ValueError: a source has no usable row, or the sources and options do not go together.
        """
        start = start or {}
        _check_sources(sources, options, start)
        streams = [Stream(source, number, options, seed, epochs, unit) for number, source in enumerate(sources)]
        starts = [stream.begin(start.get(stream.source.name)) for stream in streams]
        parts = _parts(streams, starts, options, seed, epochs, unit) | dict(about or {})
        fingerprint = blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "plan.json"
        with FileLock(folder / "lock"):
            if path.exists():
                known = json.loads(path.read_text())
                _check_unchanged(folder, known["parts"], parts)
                shares, budget = known["shares"], known["budget"]
            else:
                shares, budget = _shares(streams, starts, options, unit, progress)
                entry = {"fingerprint": fingerprint, "parts": parts, "shares": shares, "budget": budget}
                with replacing(path) as file:
                    file.write(json.dumps(entry, indent=1).encode())
        return cls(folder, streams, starts, options, seed, shares, budget, unit, flops, fingerprint)

    def reader(self) -> PlanReader:
        """A reader of the packs, for loader workers."""
        return PlanReader(self.folder, self.packs_per_batch)

    def ensure(self, packs: int, progress: bool = False) -> int:
        """Plans until there are `packs` packs, or the sources end; returns how many there are."""
        if self.planned < packs and not self.ended:
            with self._planning, FileLock(self.folder / "lock"), bar("planning packs", packs, progress) as show:
                self.refresh()
                while self.planned < packs and not self.ended:
                    self._append()
                    show(self.planned)
        return self.planned

    def ensure_ahead(self, packs: int) -> None:
        """Plans in the background until there are `packs` packs. What goes wrong there is met again by `ensure`."""
        if self.planned < packs and not self.ended and not (self._ahead and self._ahead.is_alive()):
            self._ahead = threading.Thread(target=self._go_ahead, args=(packs,), name="plan ahead", daemon=True)
            self._ahead.start()

    def _go_ahead(self, packs: int) -> None:
        try:
            while self.planned < packs and not self.ended:
                self.ensure(self.planned + 1)  # a window at a time: who needs the next one waits for no more
        except Exception as error:
            logger.warning("planning ahead failed after pack %d: %r", self.planned, error)

    @property
    def endless(self) -> bool:
        """Whether the plan has no end."""
        ends = [stream.ends for stream in self._streams]
        return not (any(ends) if self.weighted else all(ends))

    def total_packs(self, progress: bool = False) -> int | None:
        """Packs until the end, which plans everything; None if there is no end."""
        if self.endless:
            return None
        with bar("planning", 1.0, progress) as show:
            while not self.ended:
                self.ensure(self.planned + 1)
                show(self._passed())
        return self.planned

    def _passed(self) -> float:
        """Share of the way to the end that is planned, by the source that is farthest."""
        cursors = self._state(self._windows[-1] if self._windows else None).cursors
        return max(
            stream.passes(Cursor(*cursor)) / stream.epochs
            for stream, cursor in zip(self._streams, cursors.tolist(), strict=True)
            if stream.epochs is not None
        )

    def total_steps(self) -> int | None:
        """Global batches until the end, which plans everything; None if there is no end."""
        packs = self.total_packs()
        return None if packs is None else -(-packs // self.packs_per_batch)

    def statistics(self) -> Statistics:
        """What was planned so far, by source."""
        state = self._state(self._windows[-1] if self._windows else None)
        tokens, samples = int(state.tokens.sum()), int(state.samples.sum())
        items = state.items[:, self._limited].sum(axis=0)[None]
        ended = int(state.ended)
        return Statistics(
            packs=self.planned,
            samples=samples,
            tokens=tokens,
            fill=tokens / (self.planned * self.options.capacity) if self.planned else 0.0,
            lower_bound=lower_bound(state.tokens, self.options.capacity, items, self._limits),
            ended_by=None if not ended else "all sources" if ended < 0 else self.sources[ended - 1].name,
            sources={
                stream.source.name: SourceStatistics(
                    samples=int(state.samples[number]),
                    tokens=int(state.tokens[number]),
                    asked=self._shares[number] / sum(self._shares),
                    share=float(state.tokens[number] / max(tokens, 1)),
                    sample_share=float(state.samples[number] / max(samples, 1)),
                    epochs=stream.passes(Cursor(*state.cursors[number].tolist())),
                    truncated=int(state.truncated[number]),
                    items=dict(zip(self.quantities, state.items[number].tolist(), strict=True)),
                    media_tokens=dict(zip(self.quantities, state.media_tokens[number].tolist(), strict=True)),
                    dropped=dict(zip(stream.reasons, state.dropped[number].tolist(), strict=True)),
                )
                for number, stream in enumerate(self._streams)
            },
        )

    def _state(self, window: WindowFile | None) -> State:
        """Where planning stood after a window; at the start before the first."""
        if window is None:
            return State.at_start(self._starts, len(self.quantities), len(self._streams[0].reasons))
        with np.load(window.path, allow_pickle=False) as file:
            return State(**{field.name: file[field.name] for field in fields(State)})

    def _append(self) -> None:
        """Plans one window and writes it: wholly, or, if the process dies, not at all."""
        number, first = len(self._windows), self.planned
        window, state = self._plan_window(number, self._state(self._windows[-1] if self._windows else None))
        ending = ".last" if state.ended else ""
        name = f"{number:06d}.{first:012d}-{first + len(window.starts) - 1:012d}{ending}.npz"
        with replacing(self.folder / name) as file:
            np.savez(file, **window._asdict(), **vars(state))
        self.refresh()

    def _plan_window(self, window: int, before: State) -> tuple[Window, State]:
        """The packs of a window, and the state after it."""
        taken, quotas, ended = self._take(before)
        rows = np.concatenate([before.carried, *(part.rows for part in taken)])
        rows["carried"][: len(before.carried)] = True
        rows = rows[shuffled(len(rows), self.seed, "samples", window)]
        counts = rows["counts"][:, self._limited]
        packs = POLICIES[self.options.policy](rows["length"], self.options.capacity, counts, self._limits)

        keep = np.ones(packs.number, bool)
        if not ended and packs.number:
            used = np.column_stack([packs.sums(rows["length"]), packs.sums(counts)])
            fullness = (used / np.maximum([self.options.capacity, *self._limits], 1)).max(axis=1)
            # A sample waits for one window at most, however badly it fits.
            fullness[packs.sums(rows["carried"]) > 0] = 1.0
            worst = np.argsort(fullness, kind="stable")[: max(1, packs.number // CARRIED)]
            worst = worst[fullness[worst] < 1.0]
            keep[worst[self._balanced(packs.take(worst), rows, quotas)]] = False
        carried = rows[packs.take(np.flatnonzero(~keep)).order]
        packs = packs.take(np.flatnonzero(keep))
        costs = np.column_stack([packs.sums(rows["media_flops"]), packs.sums(self._flops(rows["length"]))])
        order = side_by_side(costs, self.options.alike, self.planned, self.seed, "packs", window)
        packs, costs = packs.take(order), costs[order]
        media = rows["media_tokens"]
        rows = rows[packs.order]

        def by_source(values: np.ndarray) -> np.ndarray:
            return np.bincount(rows["source"], values, len(self.sources)).astype(np.int64)

        def by_source_and_quantity(column: str) -> np.ndarray:
            return np.column_stack([by_source(values) for values in rows[column].T])

        after = State(
            cursors=np.array([part.cursor for part in taken], np.int64),
            debts=quotas.debts,
            remainders=quotas.remainders,
            carried=carried,
            ended=np.array(ended, np.int64),
            samples=before.samples + by_source(np.ones(len(rows))),
            tokens=before.tokens + by_source(rows["length"]),
            truncated=before.truncated + by_source(rows["truncated"]),
            items=before.items + by_source_and_quantity("counts"),
            media_tokens=before.media_tokens + by_source_and_quantity("media_tokens"),
            dropped=before.dropped + np.stack([part.dropped for part in taken]),
        )
        planned = rows[list(ROW.names or ())].astype(ROW)
        return Window(planned, packs.starts, costs, packs.sums(media)), after

    def _take(self, state: State) -> tuple[list[Taken], Quotas, int]:
        """What each source gives to the next window, its quotas, and `State.ended`."""
        cursors = [Cursor(*cursor) for cursor in state.cursors.tolist()]
        shares = [
            share if self.weighted or not stream.is_dry(cursor) else 0
            for share, stream, cursor in zip(self._shares, self._streams, cursors, strict=True)
        ]
        total = sum(shares) or 1
        due = [
            divmod(self._budget * share + remainder, total) if share else (0, 0)
            for share, remainder in zip(shares, state.remainders.tolist(), strict=True)
        ]
        quotas = [debt + whole for debt, (whole, _) in zip(state.debts.tolist(), due, strict=True)]
        taken = self._take_each(cursors, quotas)
        short = [
            part.amount < quota and stream.is_dry(part.cursor)
            for stream, part, quota in zip(self._streams, taken, quotas, strict=True)
        ]
        ended = 0
        if self.weighted and any(short):
            # The mixture holds to the end: all sources stop at the part of their quota that the shortest one reached.
            reached = [
                Fraction(part.amount, quota) if dry else Fraction(1)
                for part, quota, dry in zip(taken, quotas, short, strict=True)
            ]
            least = min(reached)
            ended = 1 + reached.index(least)
            taken = self._take_each(cursors, [int(quota * least) for quota in quotas])
        elif all(stream.is_dry(part.cursor) for stream, part in zip(self._streams, taken, strict=True)):
            ended = -1
        debts = [0 if dry else quota - part.amount for quota, part, dry in zip(quotas, taken, short, strict=True)]
        remainders = [remainder for _, remainder in due]
        return taken, Quotas(np.array(shares) / total, np.array(debts, np.int64), np.array(remainders, np.int64)), ended

    def _take_each(self, cursors: list[Cursor], quotas: list[int]) -> list[Taken]:
        return [
            stream.take(cursor, quota) for stream, cursor, quota in zip(self._streams, cursors, quotas, strict=True)
        ]

    def _balanced(self, packs: Packs, rows: np.ndarray, quotas: Quotas) -> np.ndarray:
        """Numbers of the packs, from the first on, that can wait for the next window and move no share by `SKEW`."""
        amounts = np.ones(len(rows), np.int64) if self._streams[0].in_samples else rows["length"].astype(np.int64)
        by_pack = np.column_stack(
            [packs.sums(np.where(rows["source"] == number, amounts, 0)) for number in range(len(self.sources))]
        )
        skews = by_pack - by_pack.sum(axis=1, keepdims=True) * quotas.shares
        most = SKEW * self._budget * max(1.0, SKEW_TOKENS / (self.options.window * self.options.capacity))
        waiting, moved = [], np.zeros(len(self.sources))
        for number, skew in enumerate(skews):
            if np.abs(moved + skew).max() <= most:
                waiting.append(number)
                moved += skew
        return np.array(waiting, np.int64)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete or not at all: written beside it, synced, then renamed."""
    temporary = path.with_name("unfinished.tmp")  # one writer at a time, so one name; a killed one's is overwritten
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _shares(
    streams: Sequence[Stream], starts: Sequence[Cursor], options: PackingOptions, unit: Unit, progress: bool
) -> tuple[list[int], int]:
    """Shares of the sources in 2⁻³², as weighted or those at which sources end together, and the quota of a window.

    The quota is `PackingOptions.window` packs full of tokens, or as many samples as that is on average.

    Raises:
        ValueError: a source has no usable row, or more must be known of it than where its shards are.
    """
    weighted = streams[0].source.weight is not None
    whole = unit == "epochs" or (not weighted and len(streams) > 1)
    sizes, lengths = [], []
    for stream, start in zip(streams, starts, strict=True):
        source = stream.source
        if whole and source.rows is None:
            raise ValueError(
                f"source {source.name}: how much it holds is not known while its shards are indexed on the way; give "
                "every source a weight in tokens or samples, or set data.lazy to false"
            )
        survey = stream.survey(whole=whole, progress=progress)
        if not survey.tokens:
            reasons = ", ".join(f"{rows} {reason}" for reason, rows in survey.dropped.items() if rows)
            raise ValueError(
                f"source {source.name}: none of its {survey.rows} rows can be used: {reasons or 'no rows'}"
            )
        epoch = survey.tokens if whole else 1
        if source.weight is None:
            sizes.append(epoch * stream.remaining(start))
        else:
            sizes.append(epoch * source.weight if unit == "epochs" else source.weight)
        lengths.append(survey.tokens / survey.samples)
    if not sum(sizes):
        raise ValueError("all sources end before they start: raise their epochs, or leave out `start`")
    budget = options.window * options.capacity
    if streams[0].in_samples:
        mean = sum(size * length for size, length in zip(sizes, lengths, strict=True)) / sum(sizes)
        budget = max(1, round(budget / mean))
    return [max(1, round(size / sum(sizes) * SHARE_UNIT)) for size in sizes], budget


def _check_unchanged(folder: Path, planned: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises `PlanChanged` that names every input that differs."""
    names = [*planned, *(name for name in asked if name not in planned)]
    changes = [
        f"{name}: {planned.get(name)!r} → {asked.get(name)!r}" for name in names if planned.get(name) != asked.get(name)
    ]
    if changes:
        raise PlanChanged(
            f"{folder} holds a plan for other inputs (planned → asked for):\n  "
            + "\n  ".join(changes)
            + "\nUndo the change, end the stage and add one (docs/stages.md), or plan into another folder"
        )


def _check_sources(sources: Sequence[Source], options: PackingOptions, start: Mapping[str, Cursor]) -> None:
    """Raises ValueError where sources do not go together or with the options."""
    names = [source.name for source in sources]
    if not names:
        raise ValueError("a plan needs at least one source")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sources need names of their own; repeated: {', '.join(sorted(repeated))}")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"either all sources have a weight or none; without one: {', '.join(without)}")
    for source in sources:
        if source.quantities != sources[0].quantities:
            raise ValueError(f"source {source.name} counts {source.quantities}, {names[0]} {sources[0].quantities}")
    if unknown := set(start) - set(names):
        raise ValueError(f"start names {', '.join(sorted(unknown))}; the sources are {', '.join(names)}")
    if unknown := set(options.limits) - set(sources[0].quantities):
        raise ValueError(
            f"packing.limits names {', '.join(sorted(unknown))}; the sources count {', '.join(sources[0].quantities)}"
        )


def _parts(
    streams: Sequence[Stream],
    starts: Sequence[Cursor],
    options: PackingOptions,
    seed: int,
    epochs: float | None,
    unit: Unit,
) -> dict[str, Any]:
    """Everything that the packs depend on, by a name that a reader of `PlanChanged` understands."""
    parts: dict[str, Any] = {"format": FORMAT, "seed": seed, "epochs": epochs, "unit": unit}
    parts |= {f"packing.{name}": value for name, value in options.of_plan().items()}
    parts["sources"] = [stream.source.name for stream in streams]
    for stream, start in zip(streams, starts, strict=True):
        source = stream.source
        parts |= {
            f"{source.name}.fingerprint": source.fingerprint,
            f"{source.name}.rows": source.rows,
            f"{source.name}.shards": source.shards,
            f"{source.name}.choice_probabilities": np.asarray(source.choice_probabilities, np.float64).tolist(),
            f"{source.name}.weight": source.weight,
            f"{source.name}.epochs": source.epochs,
            f"{source.name}.start": list(start),
        }
        parts |= {f"{source.name}.{name}": value for name, value in source.selection.items()}
    return parts
