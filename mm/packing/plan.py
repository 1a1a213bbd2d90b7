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
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from filelock import FileLock

from mm import terminal
from mm.data.passes import bar
from mm.packing.balance import side_by_side
from mm.packing.fit import POLICIES, Packs, Policy, lower_bound
from mm.packing.hashing import shuffled
from mm.packing.options import PackingOptions
from mm.packing.source import PlanError, Source, Unit
from mm.packing.streams import ROW, WITHOUT_LABEL, Cursor, Stream, Taken, row_table
from mm.packing.windows import PlanReader, Window, WindowFile, replacing

logger = terminal.logger(__name__)

FORMAT = 4
"""Changes with anything that gives other packs or files for the same inputs."""

CARRIED = 64
"""One pack in this many, the least full, is opened again in the next window."""

SKEW, SKEW_TOKENS = 2e-4, 5_000_000
"""What is carried into the next window may move the share of a source by 0.02 percentage points of a window, or of this
many tokens if the window is smaller."""

Flops = Callable[[np.ndarray], np.ndarray]
"""(n,) FLOPs of documents of (n,) tokens in the decoder."""

SHARE_UNIT = 2**32

MOST_SAMPLES = 2**22
"""Of a window."""


NO_LABEL_REMEDY = (
    ". A sample without a label teaches nothing: let some of its words bear loss (in the card `loss: true`, the "
    "default, or a chat with turns of the assistant; in the recipe weights above 0), or raise packing.capacity where "
    "`packing.too_long: truncate` cuts them off"
)


class PlanChanged(ValueError):
    """The folder holds a plan for other inputs. Going on would repeat some samples and leave out others."""


def linear(lengths: np.ndarray) -> np.ndarray:
    """FLOPs of documents, in those of a token, where attention costs nothing."""
    return lengths.astype(np.float64)


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
            PlanError: a source has no usable row, or the sources and options do not go together.
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
                show(self.passed())
        return self.planned

    def passed(self) -> float:
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
        policy = POLICIES[self.options.policy]
        rows = rows[_in_step(rows) if policy.keeps_order else shuffled(len(rows), self.seed, "samples", window)]
        counts = rows["counts"][:, self._limited]
        packs = policy(rows["length"], self.options.capacity, counts, self._limits)

        keep = np.ones(packs.number, bool)
        if not ended and packs.number:
            keep[self._waiting(packs, rows, counts, quotas, policy)] = False
        carried = rows[packs.take(np.flatnonzero(~keep)).order]
        packs = packs.take(np.flatnonzero(keep))
        costs = np.column_stack([packs.sums(rows["media_flops"]), packs.sums(self._flops(rows["length"]))])
        order = np.arange(packs.number)
        if not policy.keeps_order:
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

    def _waiting(
        self, packs: Packs, rows: np.ndarray, counts: np.ndarray, quotas: Quotas, policy: Policy
    ) -> np.ndarray:
        """Numbers of the packs that are opened again in the next window: the least full, or the last one of an order.

        A sample waits for one window at most, however badly it fits.
        """
        free = packs.sums(rows["carried"]) == 0
        if policy.keeps_order:
            return np.flatnonzero(free)[-1:] if free[-1] else np.empty(0, np.int64)
        used = np.column_stack([packs.sums(rows["length"]), packs.sums(counts)])
        fullness = (used / np.maximum([self.options.capacity, *self._limits], 1)).max(axis=1)
        worst = np.argsort(np.where(free, fullness, 1.0), kind="stable")[: max(1, packs.number // CARRIED)]
        worst = worst[free[worst] & (fullness[worst] < 1.0)]
        return worst[self._balanced(packs.take(worst), rows, quotas)]

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


def _in_step(rows: np.ndarray) -> np.ndarray:
    """(k,) order of the rows of a window in which every source keeps its own and goes on as fast as the others.

    What waited comes first.
    """
    progress = np.zeros(len(rows))
    for source in np.unique(rows["source"]):
        mine = np.flatnonzero((rows["source"] == source) & ~rows["carried"])
        progress[mine] = np.cumsum(rows["length"][mine]) / max(rows["length"][mine].sum(), 1)
    return np.argsort(progress, kind="stable")


def _shares(
    streams: Sequence[Stream], starts: Sequence[Cursor], options: PackingOptions, unit: Unit, progress: bool
) -> tuple[list[int], int]:
    """Shares of the sources in 2⁻³², as weighted or those at which sources end together, and the quota of a window.

    The quota is `PackingOptions.window` packs full of tokens, or as many samples as that is on average.

    Raises:
        PlanError: a source has no usable row, or more must be known of it than where its shards are.
    """
    weighted = streams[0].source.weight is not None
    whole = unit == "epochs" or (not weighted and len(streams) > 1)
    sizes, lengths = [], []
    for stream, start in zip(streams, starts, strict=True):
        source = stream.source
        if whole and source.rows is None:
            raise PlanError(
                f"source {source.name}: how much it holds is not known while its shards are indexed on the way; give "
                "every source a weight in tokens or samples, or set data.lazy to false"
            )
        survey = stream.survey(whole=whole, progress=progress)
        if not survey.tokens:
            reasons = ", ".join(f"{rows} {reason}" for reason, rows in survey.dropped.items() if rows)
            remedy = NO_LABEL_REMEDY if survey.dropped[WITHOUT_LABEL] else ""
            raise PlanError(
                f"source {source.name}: none of its {survey.rows} rows can be used: {reasons or 'no rows'}{remedy}"
            )
        epoch = survey.tokens if whole else 1
        if source.weight is None:
            sizes.append(epoch * stream.remaining(start))
        else:
            sizes.append(epoch * source.weight if unit == "epochs" else source.weight)
        lengths.append(survey.tokens / survey.samples)
    if not sum(sizes):
        raise PlanError("all sources end before they start: raise their epochs, or leave out `start`")
    budget = options.window * options.capacity
    mean = sum(size * length for size, length in zip(sizes, lengths, strict=True)) / sum(sizes)
    if budget / mean > MOST_SAMPLES:
        raise PlanError(
            f"packing.window × packing.capacity is {budget:,} tokens, about {budget / mean:,.0f} samples of "
            f"{mean:,.0f} tokens; a window is planned in memory and holds at most {MOST_SAMPLES:,} samples. "
            "Lower one of them"
        )
    if streams[0].in_samples:
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
    """Raises PlanError where sources do not go together or with the options."""
    names = [source.name for source in sources]
    if not names:
        raise PlanError("a plan needs at least one source")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise PlanError(f"sources need names of their own; repeated: {', '.join(sorted(repeated))}")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise PlanError(f"either all sources have a weight or none; without one: {', '.join(without)}")
    for source in sources:
        if source.quantities != sources[0].quantities:
            raise PlanError(f"source {source.name} counts {source.quantities}, {names[0]} {sources[0].quantities}")
    if unknown := set(start) - set(names):
        raise PlanError(f"start names {', '.join(sorted(unknown))}; the sources are {', '.join(names)}")
    if unknown := set(options.limits) - set(sources[0].quantities):
        raise PlanError(
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
