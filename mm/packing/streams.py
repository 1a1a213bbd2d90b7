"""The order in which a source gives its rows: a function of (seed, source, position), so any position can be resumed.

epoch ─▶ shards permuted ─▶ blocks of some shards ─▶ rows of a block permuted ─▶ choice of each row
                                                                                 │ fits? drop, truncate
Cursor(epoch, shard, span, row): row `row` of the block of `span` shards from    ▼
place `shard` of the epoch's order on                                            table of rows (`row_table`)

For a packing policy that keeps order nothing is permuted.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np

from mm.data.passes import bar
from mm.packing.fit import POLICIES
from mm.packing.hashing import hash64, shuffled
from mm.packing.options import PackingOptions
from mm.packing.source import EXCLUSIONS, PlanError, Rows, Source, Unit

ROW = np.dtype(
    [
        ("source", "<i2"),
        ("shard", "<i4"),
        ("row", "<i4"),
        ("stamp", "<u4"),
        ("choice", "<i2"),
        ("epoch", "<i4"),
        ("length", "<i4"),
        ("truncated", "?"),
        ("carried", "?"),  # from the window before
    ]
)
"""A planned sample."""

UNUSABLE, TOO_LONG, NO_LABEL, OVER_LIMIT = 1, 2, 3 + len(EXCLUSIONS), 4 + len(EXCLUSIONS)
"""Verdicts on a row, after 0 for a usable one. Those between `TOO_LONG` and `NO_LABEL` are the exclusions;
``OVER_LIMIT + m`` is more items of quantity m than the limit."""

WITHOUT_LABEL = "without a label"
"""The reason of `NO_LABEL`: no token of it, as far as it fits into a pack, is learned."""

CHUNK = 16_384  # rows looked at together
PROBABILITY_UNIT = 2**16


def row_table(quantities: int) -> np.dtype:
    """`ROW` with what packing needs to know of a sample: items and tokens of M quantities, FLOPs of its media."""
    columns = [("counts", "<i4", (quantities,)), ("media_tokens", "<i4", (quantities,)), ("media_flops", "<f8")]
    return np.dtype([*ROW.descr, *columns])


class Cursor(NamedTuple):
    """A position in the order of a source.

    epoch: from 0
    shard: place in the epoch's order of the first shard of a block
    span: shards of that block; 0 before there is one
    row: place in the block's order
    """

    epoch: int = 0
    shard: int = 0
    span: int = 0
    row: int = 0


class Survey(NamedTuple):
    """Tokens and samples that some rows give on average over the choices, how many they are, and others by reason."""

    tokens: int
    samples: int
    rows: int
    dropped: dict[str, int]


class Taken(NamedTuple):
    """What a stream gave.

    rows: (k,) `row_table` usable samples
    amount: tokens or samples in them, as was asked
    cursor: the position after them
    dropped: (R,) int64 rows passed over, by verdict less 1
    """

    rows: np.ndarray
    amount: int
    cursor: Cursor
    dropped: np.ndarray


class _Block(NamedTuple):
    """Some shards whose rows are shuffled together.

    epoch, shard, span: as of a `Cursor`
    members: (span,) numbers of the shards
    rows: of these shards, in that order
    order: (n,) which of `rows` comes when
    member, row: (n,) of each of `rows`, the place of its shard in `members` and its row there
    """

    epoch: int
    shard: int
    span: int
    members: np.ndarray
    rows: Rows
    order: np.ndarray
    member: np.ndarray
    row: np.ndarray


class Stream:
    """The rows of a source in the plan's order, without end or for some epochs."""

    def __init__(
        self, source: Source, number: int, options: PackingOptions, seed: int, epochs: float | None, unit: Unit
    ) -> None:
        """A stream from the beginning.

        Args:
            number: of the source in the plan.
            epochs: where the source does not say how often its rows are seen; None: endlessly.

        Raises:
            PlanError: `unit` is none, or `source` is indexed while the plan goes on and ends within an epoch.
        """
        if unit not in get_args(Unit):
            raise PlanError(f"weights are in {', '.join(get_args(Unit))}, not in {unit!r}")
        self.source = source
        self.number = number
        self.in_samples = unit == "samples" and source.weight is not None
        self.seed = seed
        self.capacity = options.capacity
        self.truncates = options.too_long == "truncate"
        self.shuffle_shards = options.shuffle_shards
        self.keeps_order = POLICIES[options.policy].keeps_order
        self.limits = np.array([options.limits.get(name, np.iinfo(np.int64).max) for name in source.quantities])
        epochs = source.epochs if source.epochs is not None else epochs
        self.epochs = epochs
        rows = source.rows
        self.end = None if epochs is None or rows is None else round(epochs * rows)
        if rows is None and epochs is not None and epochs != int(epochs):
            raise PlanError(
                f"source {source.name}: {epochs} epochs end within an epoch, and how many rows that is cannot be known "
                "while shards are indexed on the way; ask for whole epochs, or set data.lazy to false"
            )
        self._table = row_table(len(source.quantities))
        probabilities = np.asarray(source.choice_probabilities, np.float64)
        # Whole numbers, so that a draw never depends on how a machine rounds.
        units = np.rint(probabilities * PROBABILITY_UNIT).astype(np.uint64)
        self._choice_units = np.maximum(units, (probabilities > 0).astype(np.uint64))
        self._order: tuple[int, np.ndarray] | None = None
        self._block: _Block | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a row can be passed over, by verdict less 1."""
        limits = (f"more {name} items than the limit" for name in self.source.quantities)
        return ("unusable", "too long", *EXCLUSIONS, WITHOUT_LABEL, *limits)

    @property
    def ends(self) -> bool:
        """Whether it is passed over some times only."""
        return self.epochs is not None

    def survey(self, *, whole: bool, progress: bool = False) -> Survey:
        """What the rows give after dropping and truncating: of an epoch, or of the first block that gives any."""
        tokens = samples = looked = 0
        dropped = np.zeros(len(self.reasons), np.int64)
        shards = self._shards(0)
        with bar(f"looking through {self.source.name}", len(shards), progress) as show:
            for first in range(0, len(shards), self.shuffle_shards):
                rows = self._load(shards[first : first + self.shuffle_shards])
                for start in range(0, len(rows.tokens), CHUNK):
                    chosen = np.arange(start, min(start + CHUNK, len(rows.tokens)))
                    *means, verdict = self._on_average(rows, chosen)
                    tokens, samples = tokens + means[0], samples + means[1]
                    dropped += np.bincount(verdict, minlength=len(dropped) + 1)[1:]
                    looked += len(chosen)
                show(first + self.shuffle_shards)
                if tokens and not whole:
                    break
        by_reason = dict(zip(self.reasons, dropped.tolist(), strict=True))
        return Survey(tokens // PROBABILITY_UNIT, -(-samples // PROBABILITY_UNIT), looked, by_reason)

    def _on_average(self, rows: Rows, chosen: np.ndarray) -> tuple[int, int, np.ndarray]:
        """Tokens and samples over the choices, in `PROBABILITY_UNIT`, and (k,) the verdict under the best of them."""
        units = self._usable_units(rows, chosen)
        total = np.maximum(units.sum(axis=1), np.uint64(1))
        tokens = samples = 0
        best = np.full(len(chosen), len(self.reasons))
        for choice in range(units.shape[1]):
            length, verdict, _ = self._assess(rows, chosen, np.full(len(chosen), choice))
            share = (units[:, choice] * np.uint64(PROBABILITY_UNIT) // total).astype(np.int64)
            tokens += int(np.where(verdict == 0, length * share, 0).sum())
            samples += int(share[verdict == 0].sum())
            best = np.where((best == 0) | (verdict == 0), 0, verdict)
        return tokens, samples, best

    def begin(self, start: Cursor | None) -> Cursor:
        """Where a plan begins that goes on from a position of another one.

        A block of another span cannot be gone on with, since its rows have another order: its rest is passed over.
        """
        if start is None:
            return Cursor()
        if start.row and start.span != self.shuffle_shards:
            start = Cursor(start.epoch, start.shard + start.span, 0, 0)
        return Cursor(start.epoch + 1) if start.shard >= self.source.shards else start

    def is_dry(self, cursor: Cursor) -> bool:
        """Whether nothing comes after this position."""
        if self.end is not None:
            return self.position(cursor) >= self.end
        return self.epochs is not None and cursor.epoch >= self.epochs

    def remaining(self, cursor: Cursor) -> float:
        """Epochs from a position to the end; 1 if there is none."""
        if self.is_dry(cursor):
            return 0.0
        return 1.0 if self.epochs is None else self.epochs - self.passes(cursor)

    def position(self, cursor: Cursor) -> int:
        """Rows before a position, from the beginning of epoch 0. Only for a source whose rows are counted."""
        assert self.source.shard_rows is not None
        before = self.source.shard_rows[self._shards(cursor.epoch)[: cursor.shard]].sum()
        return cursor.epoch * int(np.sum(self.source.shard_rows)) + int(before) + cursor.row

    def passes(self, cursor: Cursor) -> float:
        """Epochs before a position; where rows are not counted, to the last whole block."""
        if self.source.rows is not None:
            return self.position(cursor) / self.source.rows
        return cursor.epoch + cursor.shard / self.source.shards

    def take(self, cursor: Cursor, amount: int) -> Taken:
        """The samples from `cursor` on that come nearest to `amount` tokens, or samples if `in_samples`.

        That is within half a sample, unless the stream ends before.

        Raises:
            PlanError: a whole epoch has nothing that can be used.
        """
        pieces = [np.empty(0, self._table)]
        dropped = np.zeros(len(self.reasons), np.int64)
        got, enough, fruitful = 0, amount <= 0, cursor
        while not enough and not self.is_dry(cursor):
            block = self._block_at(cursor)
            chosen = block.order[cursor.row :][:CHUNK]
            if self.end is not None:
                chosen = chosen[: self.end - self.position(cursor)]
            choice = self._choices(block, chosen)
            length, verdict, truncated = self._assess(block.rows, chosen, choice)
            usable = verdict == 0
            filled = got + np.cumsum(np.where(usable, 1 if self.in_samples else length, 0))
            stop = int(np.searchsorted(filled, amount))  # the row that reaches the amount
            enough = stop < len(chosen)
            if enough and 2 * amount >= filled[stop] + (filled[stop - 1] if stop else got):
                stop += 1  # with it is nearer than without
            taken = np.flatnonzero(usable[:stop])
            pieces.append(self._pieces(block, chosen[taken], choice[taken], length[taken], truncated[taken]))
            dropped += np.bincount(verdict[:stop], minlength=len(dropped) + 1)[1:]
            got = int(filled[stop - 1]) if stop else got
            cursor = self._after(block, cursor.row + stop)
            if len(taken):
                fruitful = cursor
            elif cursor.epoch > fruitful.epoch + 1:  # epochs have orders of their own: nothing less is all rows
                raise PlanError(f"source {self.source.name}: a whole epoch has no row that can be used")
        return Taken(np.concatenate(pieces), got, cursor, dropped)

    def _pieces(
        self, block: _Block, chosen: np.ndarray, choice: np.ndarray, length: np.ndarray, truncated: np.ndarray
    ) -> np.ndarray:
        """`row_table` of some rows of a block."""
        rows, member = block.rows, block.member[chosen]
        table = np.zeros(len(chosen), self._table)
        table["source"], table["epoch"] = self.number, block.epoch
        table["shard"], table["row"] = block.members[member], block.row[chosen]
        table["choice"], table["length"], table["truncated"] = choice, length, truncated
        table["counts"] = rows.counts[chosen]
        if rows.stamps is not None:
            table["stamp"] = rows.stamps[member]
        if rows.media_tokens is not None:
            table["media_tokens"] = rows.media_tokens[chosen]
        if rows.media_flops is not None:
            table["media_flops"] = rows.media_flops[chosen]
        return table

    def _shards(self, epoch: int) -> np.ndarray:
        """(S,) numbers of the shards in the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            number, keys = self.source.shards, (self.seed, self.source.name, epoch, "shards")
            self._order = (epoch, np.arange(number) if self.keeps_order else shuffled(number, *keys))
        return self._order[1]

    def _block_at(self, cursor: Cursor) -> _Block:
        """The block that a position lies in, its rows loaded."""
        if self._block is None or (self._block.epoch, self._block.shard) != (cursor.epoch, cursor.shard):
            members = self._shards(cursor.epoch)[cursor.shard :][: self.shuffle_shards]
            known, self._block = self._block, None  # two blocks need not be in memory
            same = known is not None and np.array_equal(known.members, members)  # a small source, in its next epoch
            rows = known.rows if known is not None and same else self._load(members)
            member = np.repeat(np.arange(len(members)), rows.shards)
            row = np.arange(len(member)) - np.repeat(rows.starts[:-1], rows.shards)
            key = hash64(self.seed, self.source.name, cursor.epoch, "rows", members[member], row)
            order = np.arange(len(row)) if self.keeps_order else np.argsort(key, kind="stable")
            self._block = _Block(cursor.epoch, cursor.shard, len(members), members, rows, order, member, row)
        return self._block

    def _load(self, shards: np.ndarray) -> Rows:
        rows = self.source.load(shards.tolist())
        if self.truncates and rows.media_end is None and rows.counts.any():
            raise PlanError(f"source {self.source.name}: packing.too_long=truncate needs media_end, or it cuts media")
        return rows

    def _after(self, block: _Block, row: int) -> Cursor:
        """The position before this row of a block; behind its last one, at the beginning of the next."""
        if row < len(block.order):
            return Cursor(block.epoch, block.shard, self.shuffle_shards, row)
        following = block.shard + block.span
        return Cursor(block.epoch + 1) if following == self.source.shards else Cursor(block.epoch, following)

    def _usable_units(self, rows: Rows, chosen: np.ndarray) -> np.ndarray:
        """(k, C) uint64 probabilities of the choices that the rows have, not normalised."""
        return (rows.tokens[chosen] > 0) * self._choice_units

    def _choices(self, block: _Block, chosen: np.ndarray) -> np.ndarray:
        """(k,) int64 choice of each row, among those that it has."""
        upper = np.cumsum(self._usable_units(block.rows, chosen), axis=1)
        shard, row = block.members[block.member[chosen]], block.row[chosen]
        draw = hash64(self.seed, self.source.name, block.epoch, "choice", shard, row) >> np.uint64(32)
        drawn = (draw * upper[:, -1]) >> np.uint64(32)
        return np.minimum((drawn[:, None] >= upper).sum(axis=1), upper.shape[1] - 1)

    def _assess(self, rows: Rows, chosen: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k,) int64 length in the pack, (k,) int64 verdict, and (k,) bool whether the text is cut to fit."""
        length = rows.tokens[chosen, choice].astype(np.int64)
        verdict = np.zeros(len(chosen), np.int64)
        over = rows.counts[chosen] > self.limits
        verdict[over.any(axis=1)] = OVER_LIMIT + over.argmax(axis=1)[over.any(axis=1)]
        too_long = length > self.capacity
        truncated = np.zeros(len(chosen), bool)
        if self.truncates:
            media_end = 0 if rows.media_end is None else rows.media_end[chosen, choice]
            truncated = too_long & (media_end < self.capacity)  # a text token at least follows the last media item
        verdict[too_long & ~truncated] = TOO_LONG
        verdict[length <= 0] = UNUSABLE
        if rows.excluded is not None:
            excluded = rows.excluded[chosen].astype(np.int64)
            verdict = np.where(excluded > 0, TOO_LONG + excluded, verdict)
        length = np.where(truncated, self.capacity, length)
        if rows.first_label is not None:
            verdict[(verdict == 0) & (rows.first_label[chosen, choice] >= length)] = NO_LABEL
        return length, verdict, truncated & (verdict == 0)
