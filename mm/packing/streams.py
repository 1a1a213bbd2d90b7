"""The order in which a source gives its rows: a function of (seed, source, position), so any position can be resumed.

epoch ─▶ shards permuted ─▶ blocks of some shards ─▶ rows of a block permuted ─▶ choice of each row
                                                                                 │ fits? drop, truncate
position 0 … n-1 is epoch 0, n … 2n-1 is epoch 1, …                              ▼
                                                                                 table of rows (`ROW`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from mm.packing.hashing import hash64, shuffled
from mm.packing.options import PackingOptions
from mm.sample import MEDIA_PARTS

ROW = np.dtype(
    [
        ("source", "<i4"),
        ("row", "<i8"),
        ("choice", "<i2"),
        ("epoch", "<i4"),
        ("length", "<i4"),
        ("truncated", "?"),
        ("carried", "?"),  # from the window before
    ]
)
"""A planned sample."""

QUANTITIES = tuple(modality.label for modality in MEDIA_PARTS)
"""What is counted of a sample unless a source says otherwise: items per modality."""

Unit = Literal["tokens", "samples", "epochs"]
"""What the weights of sources are shares of: the tokens of the mixture, its samples, or passes over each source."""

EXCLUSIONS = ("dropped by `mm data drop`", "filtered out by `where`", "`where` asks for a value that is missing")
"""Why a row can be left out on purpose."""

DROPPED, FILTERED, MISSING = 1, 2, 3
"""`EXCLUSIONS` as numbers, for `Source.excluded`."""

UNUSABLE, TOO_LONG, OVER_LIMIT = 1, 2, 3 + len(EXCLUSIONS)
"""Verdicts on a row, after 0 for a usable one. Those between `TOO_LONG` and `OVER_LIMIT` are the exclusions;
``OVER_LIMIT + m`` is more items of quantity m than the limit."""

CHUNK = 16_384  # rows looked at together
PROBABILITY_UNIT = 2**16


@dataclass(frozen=True, eq=False)
class Source:
    """What the plan knows of a source: numbers alone, over n rows in the order of its shards.

    name: unique among the sources of a recipe
    shards: (S,) int, rows of each shard; ``sum(shards) == n``
    tokens: (n, C) int32 document length under each choice of text; 0 where the row is broken, excluded or has none
    choice_probabilities: (C,) float; a row draws among the choices whose length is not 0
    counts: (n, M) int, items of each of `quantities`
    fingerprint: of everything that the arrays were computed from: shards, tokenizer, transforms
    weight: share of the mixture in the plan's unit, relative to the other sources'; either all sources have one or none
    epochs: how often each row is seen, at most if there are weights; None: as the plan says
    media_end: (n, C) int32 tokens up to the end of the last media item, needed to truncate; None if there are no media
    media_tokens: (n, M) int tokens of each quantity, for reports; None if unknown
    excluded: (n,) uint8 `DROPPED`, `FILTERED`, `MISSING`, or 0 for a row that takes part; None if all do
    selection: what `excluded` was computed from, by names that a reader of `PlanChanged` understands; JSON values
    """

    name: str
    shards: np.ndarray
    tokens: np.ndarray
    choice_probabilities: np.ndarray
    counts: np.ndarray
    fingerprint: str
    weight: float | None = None
    epochs: float | None = None
    media_end: np.ndarray | None = None
    media_tokens: np.ndarray | None = None
    excluded: np.ndarray | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    quantities: tuple[str, ...] = QUANTITIES

    def __post_init__(self) -> None:
        rows, choices = self.tokens.shape
        shapes = {
            "shards": (np.sum(self.shards), rows),
            "choice_probabilities": (np.shape(self.choice_probabilities), (choices,)),
            "counts": (self.counts.shape, (rows, len(self.quantities))),
        }
        if self.media_end is not None:
            shapes["media_end"] = (self.media_end.shape, (rows, choices))
        if self.media_tokens is not None:
            shapes["media_tokens"] = (self.media_tokens.shape, (rows, len(self.quantities)))
        if self.excluded is not None:
            shapes["excluded"] = (self.excluded.shape, (rows,))
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"source {self.name}: {name} is for {found}, the tokens are for {expected}")
        probabilities = np.asarray(self.choice_probabilities, np.float64)
        if (probabilities < 0).any() or not np.isclose(probabilities.sum(), 1):
            raise ValueError(f"source {self.name}: choice probabilities {probabilities.tolist()} do not add up to 1")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ValueError(
                    f"source {self.name}: {name} must be a number greater than 0, not {value}; "
                    "to leave a source out, remove it from the recipe"
                )

    @property
    def rows(self) -> int:
        return len(self.tokens)


class Survey(NamedTuple):
    """One epoch of a source: tokens and samples that it gives on average over the choices, and other rows by reason."""

    tokens: int
    samples: int
    dropped: dict[str, int]


class Taken(NamedTuple):
    """What a stream gave.

    rows: (k,) `ROW` usable samples
    amount: tokens or samples in them, as was asked
    cursor: the position after them
    dropped: (R,) int64 rows passed over, by verdict less 1
    """

    rows: np.ndarray
    amount: int
    cursor: int
    dropped: np.ndarray


class Stream:
    """The rows of a source, over and over, or until `end` rows were passed."""

    def __init__(
        self,
        source: Source,
        number: int,
        options: PackingOptions,
        seed: int,
        epochs: float | None,
        unit: Unit = "tokens",
    ) -> None:
        if unit not in get_args(Unit):
            raise ValueError(f"weights are in {', '.join(get_args(Unit))}, not in {unit!r}")
        if options.too_long == "truncate" and source.media_end is None and source.counts.any():
            raise ValueError(f"source {source.name}: packing.too_long=truncate needs media_end, or it would cut media")
        self.source = source
        self.number = number
        self.seed = seed
        self.in_samples = unit == "samples" and source.weight is not None
        self.capacity = options.capacity
        self.truncates = options.too_long == "truncate"
        self.shuffle_shards = options.shuffle_shards
        unlimited = np.iinfo(np.int64).max
        self.limits = np.array([options.limits.get(name, unlimited) for name in source.quantities], np.int64)
        epochs = source.epochs if source.epochs is not None else epochs
        self.end = None if epochs is None else round(epochs * source.rows)
        self._shard_starts = np.concatenate([[0], np.cumsum(source.shards)]).astype(np.int64)
        probabilities = np.asarray(source.choice_probabilities, np.float64)
        # Whole numbers, so that a draw never depends on how a machine rounds.
        units = np.rint(probabilities * PROBABILITY_UNIT).astype(np.uint64)
        self._choice_units = np.maximum(units, (probabilities > 0).astype(np.uint64))
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._block: tuple[int, int, np.ndarray] | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a row can be passed over, by verdict less 1."""
        limits = (f"more {name} items than the limit" for name in self.source.quantities)
        return ("unusable", "too long", *EXCLUSIONS, *limits)

    def survey(self) -> Survey:
        """What an epoch holds after dropping and truncating."""
        tokens = samples = 0
        dropped = np.zeros(len(self.reasons), np.int64)
        for start in range(0, self.source.rows, CHUNK):
            rows = np.arange(start, min(start + CHUNK, self.source.rows))
            units = self._usable_units(rows)
            total = np.maximum(units.sum(axis=1), np.uint64(1))
            best = np.full(len(rows), len(self.reasons))
            for choice in range(units.shape[1]):
                length, verdict, _ = self._assess(rows, np.full(len(rows), choice))
                share = (units[:, choice] * np.uint64(PROBABILITY_UNIT) // total).astype(np.int64)
                tokens += int(np.where(verdict == 0, length * share, 0).sum())
                samples += int(share[verdict == 0].sum())
                best = np.where((best == 0) | (verdict == 0), 0, verdict)
            dropped += np.bincount(best, minlength=len(dropped) + 1)[1:]
        by_reason = dict(zip(self.reasons, dropped.tolist(), strict=True))
        return Survey(tokens // PROBABILITY_UNIT, -(-samples // PROBABILITY_UNIT), by_reason)

    def is_dry(self, cursor: int) -> bool:
        """Whether nothing comes after this position."""
        return self.end is not None and cursor >= self.end

    def take(self, cursor: int, amount: int) -> Taken:
        """The samples from `cursor` on that come nearest to `amount` tokens, or samples if `in_samples`.

        That is within half a sample, unless the stream ends before.
        """
        pieces = [np.empty(0, ROW)]
        dropped = np.zeros(len(self.reasons), np.int64)
        got, enough = 0, amount <= 0
        while not enough and not self.is_dry(cursor):
            epoch, within = divmod(cursor, self.source.rows)
            rows = self._rows_from(epoch, within)[:CHUNK]
            if self.end is not None:
                rows = rows[: self.end - cursor]
            choice = self._choices(rows, epoch)
            length, verdict, truncated = self._assess(rows, choice)
            usable = verdict == 0
            filled = got + np.cumsum(np.where(usable, 1 if self.in_samples else length, 0))
            stop = int(np.searchsorted(filled, amount))  # the row that reaches the amount
            enough = stop < len(rows)
            if enough and 2 * amount >= filled[stop] + (filled[stop - 1] if stop else got):
                stop += 1  # with it is nearer than without
            piece = np.zeros(int(usable[:stop].sum()), ROW)
            chosen = np.flatnonzero(usable[:stop])
            piece["source"], piece["epoch"] = self.number, epoch
            piece["row"], piece["choice"] = rows[chosen], choice[chosen]
            piece["length"], piece["truncated"] = length[chosen], truncated[chosen]
            pieces.append(piece)
            dropped += np.bincount(verdict[:stop], minlength=len(dropped) + 1)[1:]
            got = int(filled[stop - 1]) if stop else got
            cursor += stop
        return Taken(np.concatenate(pieces), got, cursor, dropped)

    def _rows_from(self, epoch: int, within: int) -> np.ndarray:
        """Rows of an epoch from a position to the end of the position's block, in shuffled order."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = shuffled(len(self.source.shards), self.seed, self.source.name, epoch, "shards")
            sizes = np.add.reduceat(self.source.shards[shards], np.arange(0, len(shards), self.shuffle_shards))
            self._epoch = (epoch, shards, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        _, shards, block_starts = self._epoch
        block = int(np.searchsorted(block_starts, within, side="right")) - 1
        if self._block is None or self._block[:2] != (epoch, block):
            members = shards[block * self.shuffle_shards : (block + 1) * self.shuffle_shards]
            rows = np.concatenate([np.arange(*self._shard_starts[shard : shard + 2]) for shard in members])
            key = hash64(self.seed, self.source.name, epoch, "rows", rows)
            self._block = (epoch, block, rows[np.argsort(key, kind="stable")])
        return self._block[2][within - block_starts[block] :]

    def _usable_units(self, rows: np.ndarray) -> np.ndarray:
        """(k, C) uint64 probabilities of the choices that the rows have, not normalised."""
        return (self.source.tokens[rows] > 0) * self._choice_units

    def _choices(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """(k,) int64 choice of each row, among those that it has."""
        upper = np.cumsum(self._usable_units(rows), axis=1)
        draw = hash64(self.seed, self.source.name, epoch, "choice", rows) >> np.uint64(32)
        drawn = (draw * upper[:, -1]) >> np.uint64(32)
        return np.minimum((drawn[:, None] >= upper).sum(axis=1), upper.shape[1] - 1)

    def _assess(self, rows: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k,) int64 length in the pack, (k,) int64 verdict, and (k,) bool whether the text is cut to fit."""
        length = self.source.tokens[rows, choice].astype(np.int64)
        verdict = np.zeros(len(rows), np.int64)
        over = self.source.counts[rows] > self.limits
        verdict[over.any(axis=1)] = OVER_LIMIT + over.argmax(axis=1)[over.any(axis=1)]
        too_long = length > self.capacity
        truncated = np.zeros(len(rows), bool)
        if self.truncates:
            media_end = 0 if self.source.media_end is None else self.source.media_end[rows, choice]
            truncated = too_long & (media_end < self.capacity)  # a text token at least follows the last media item
        verdict[too_long & ~truncated] = TOO_LONG
        verdict[length <= 0] = UNUSABLE
        if self.source.excluded is not None:
            excluded = self.source.excluded[rows].astype(np.int64)
            verdict = np.where(excluded > 0, TOO_LONG + excluded, verdict)
        return np.where(truncated, self.capacity, length), verdict, truncated & (verdict == 0)
