"""Which samples share a pack: bin packing with a capacity in tokens and limits on items.

    lengths (n,) ──▶ shelves ──one pack at a time──▶ Packs(order (n,), starts (p + 1,))
    counts (n, M)    equal samples are one cell      pack i is order[starts[i]:starts[i + 1]]

Filling one pack completely before opening the next, always with the longest sample that still fits, gives the packs of
first-fit-decreasing without ever looking at a full pack again. Lengths are small integers, so equal samples form cells,
and a pack that consists of cells with samples left is repeated at no cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

RESOLUTION = 128
"""Limits above this (patches, frames) are counted in this many units, rounded up, so that samples form few shelves."""

CLOSE_ENOUGH = 1.015
"""Within 1.5 % of the lower bound, packing with a reserve is not tried (see `_Packer`)."""


class Packs(NamedTuple):
    """Packs as slices of an order of the samples.

    order: (n,) int64 sample numbers
    starts: (p + 1,) int64; pack i holds ``order[starts[i]:starts[i + 1]]``, never nothing
    """

    order: np.ndarray
    starts: np.ndarray

    @property
    def number(self) -> int:
        """How many packs there are."""
        return len(self.starts) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(p,) or (p, M) int64 sums over each pack of `values`, (n,) or (n, M)."""
        ordered = np.asarray(values, np.int64)[self.order]
        return np.add.reduceat(ordered, self.starts[:-1]) if len(ordered) else ordered

    def take(self, packs: np.ndarray) -> Packs:
        """The packs with these numbers, in this order. `order` then holds only their samples."""
        sizes = np.diff(self.starts)[packs]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return Packs(self.order[np.repeat(self.starts[packs], sizes) + within], starts)


def lower_bound(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> float:
    """No packing needs fewer packs: max(ΣL / capacity, Σn / limit), not rounded up."""
    bound = float(np.sum(lengths, dtype=np.int64)) / capacity
    if counts is None or limits is None:
        return bound
    totals = np.asarray(counts, np.int64).sum(axis=0).tolist()
    return max([bound, *(total / int(limit) for total, limit in zip(totals, limits, strict=True) if total)])


def first_fit_decreasing(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Packs of at most `capacity` tokens and `limits` items, in few packs.

    Without limits these are exactly the packs of first-fit-decreasing (Johnson 1973). Where a limit may bind, the
    longest-first rule would spend all text in the first packs and leave packs full of items but empty of tokens to the
    end; then samples rich in tokens and rich in items alternate so that every pack, and so the rest, keeps the ratio of
    the whole.

    Args:
        lengths: (n,) int, tokens of each sample, at least 1.
        counts: (n, M) int, items of each sample per modality.
        limits: (M,) int, most items per modality in a pack.

    Raises:
        ValueError: a sample fits no pack, or the arrays disagree.
    """
    lengths, needs, units = _checked(lengths, capacity, counts, limits)
    if not len(lengths):
        return Packs(np.empty(0, np.int64), np.zeros(1, np.int64))
    cells = _Cells.of(lengths, needs)
    patterns = _Packer(cells, capacity, units, reserve=False).patterns()
    if _number(patterns) > CLOSE_ENOUGH * lower_bound(lengths, capacity, needs, units) and len(units):
        patterns = min(patterns, _Packer(cells, capacity, units, reserve=True).patterns(), key=_number)
    return _packs(patterns, cells)


def in_order(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Next-fit: samples keep their order and a pack is closed by the first sample that does not fit. As above."""
    lengths, needs, units = _checked(lengths, capacity, counts, limits)
    room = [capacity, *units.tolist()]
    starts = [0]
    used = [0] * len(room)
    for number, sample in enumerate(np.column_stack([lengths, needs]).tolist()):
        used = [total + size for total, size in zip(used, sample, strict=True)]
        if any(total > most for total, most in zip(used, room, strict=True)):
            starts.append(number)
            used = sample
    ends = [len(lengths)] if len(lengths) else []
    return Packs(np.arange(len(lengths)), np.array(starts + ends, np.int64))


def one_per_pack(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Every sample alone, as training without packing would have it. Arguments as `first_fit_decreasing`."""
    lengths, _, _ = _checked(lengths, capacity, counts, limits)
    return Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))


Policy = Callable[[np.ndarray, int, np.ndarray | None, np.ndarray | None], Packs]

POLICIES: dict[str, Policy] = {
    "first-fit-decreasing": first_fit_decreasing,
    "in-order": in_order,
    "one-per-pack": one_per_pack,
}


def _checked(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None, limits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (n,), needs (n, m) in units of the limits, and units (m,), for the m modalities that occur."""
    lengths = np.asarray(lengths, np.int64)
    number = len(lengths)
    counts = np.zeros((number, 0), np.int64) if counts is None else np.asarray(counts, np.int64)
    limits = np.zeros(0, np.int64) if limits is None else np.asarray(limits, np.int64)
    if counts.shape != (number, len(limits)):
        raise ValueError(f"counts have shape {counts.shape}; {number} samples and {len(limits)} limits were given")
    misfits = np.flatnonzero((lengths < 1) | (lengths > capacity) | (counts < 0).any(1) | (counts > limits).any(1))
    if len(misfits):
        first = misfits[0]
        raise ValueError(
            f"{len(misfits)} samples fit no pack of {capacity} tokens and {limits.tolist()} items: "
            f"{misfits[:8].tolist()}; sample {first} has {lengths[first]} tokens and {counts[first].tolist()} items. "
            "Drop or cut them first"
        )
    occurs = counts.any(0)
    counts, limits = counts[:, occurs], limits[occurs]
    coarse = limits > RESOLUTION
    needs = np.where(coarse, -(-counts * RESOLUTION // np.maximum(limits, 1)), counts)
    return lengths, needs, np.where(coarse, RESOLUTION, limits)


class _Cells(NamedTuple):
    """Samples sorted by needs, then length; the c different ones are cells.

    order: (n,) int64 sample numbers, stable within a cell
    sizes: (c,) int64 samples of each cell
    lengths: (c,) int64; needs: (c, m) int64
    """

    order: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    needs: np.ndarray

    @staticmethod
    def of(lengths: np.ndarray, needs: np.ndarray) -> _Cells:
        order = np.lexsort((lengths, *needs.T))
        differs = np.diff(lengths[order]) != 0
        for need in needs.T:
            differs |= np.diff(need[order]) != 0
        starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
        first = order[starts]
        return _Cells(order, np.diff(starts, append=len(order)), lengths[first], needs[first])

    @property
    def shelves(self) -> list[tuple[int, int]]:
        """(first cell, cell after the last) of each run of cells with the same needs."""
        cuts = np.flatnonzero((np.diff(self.needs, axis=0) != 0).any(1)) + 1
        return list(pairwise([0, *cuts.tolist(), len(self.sizes)]))


class _Pattern(NamedTuple):
    """A pack as (cell, samples) pairs, and how often it occurs."""

    cells: list[tuple[int, int]]
    times: int


@dataclass(slots=True)
class _Shelf:
    """Cells with the same needs, by ascending length.

    need: packed needs (see `_Packer`); items: the need for the steering modality
    lengths: tokens of the samples of each cell; left: how many are left; first: number of the first cell
    below: rank of the longest cell that is not empty, at or below each rank (a union-find); ranks start at 1, 0 is none
    """

    need: int
    items: int
    lengths: list[int]
    left: list[int]
    first: int
    below: list[int]

    def tokens(self) -> int:
        return sum(length * number for length, number in zip(self.lengths, self.left, strict=True))

    def trim(self) -> None:
        """Removes empty cells at the long end."""
        while self.left and not self.left[-1]:
            self.lengths.pop()
            self.left.pop()
            self.below.pop()

    def longest(self, room: float) -> int:
        """Rank of the longest sample with at most `room` tokens; 0 if there is none."""
        below = self.below
        rank = bisect_right(self.lengths, room)
        while below[rank] != rank:
            below[rank] = below[below[rank]]
            rank = below[rank]
        return rank


class _Packer:
    """Builds pack after pack from shelves.

    The modality whose limit is tightest steers. ρ is tokens per item of what is left. Samples with L ≥ ρ·n are heavy,
    the others light. A pack with too few tokens for its items takes the longest heavy sample, otherwise the light
    sample with most items. With a reserve, a heavy sample is taken only if the tokens left after it give every item
    that the pack has yet to get as many as light samples have on average. That helps where tokens and items bind
    together and wastes tokens where only they bind.

    Needs of several modalities are packed into one integer with a guard bit above each field: a field that would go
    below zero borrows its guard bit, so one subtraction tests all limits.
    """

    def __init__(self, cells: _Cells, capacity: int, units: np.ndarray, *, reserve: bool):
        self.capacity = capacity
        totals = cells.sizes @ cells.needs
        steering = int(np.argmax(totals / units)) if len(units) else None
        self.limit = 0 if steering is None else int(units[steering])
        self.items_left = 0 if steering is None else int(totals[steering])
        self.tokens_left = int(cells.sizes @ cells.lengths)
        ratio = self.tokens_left / self.items_left if self.items_left else 0.0

        bits = [int(unit).bit_length() + 1 for unit in units]
        shifts = [sum(bits[:modality]) for modality in range(len(bits))]
        self.guards = sum(1 << (shift + bit - 1) for shift, bit in zip(shifts, bits, strict=True))
        self.free = self.guards + sum(int(unit) << shift for unit, shift in zip(units, shifts, strict=True))

        self.heavy: list[_Shelf] = []
        self.light: list[_Shelf] = []
        for start, stop in cells.shelves:
            need = cells.needs[start].tolist()
            packed = sum(size << shift for size, shift in zip(need, shifts, strict=True))
            items = 0 if steering is None else need[steering]
            cut = start + int(np.searchsorted(cells.lengths[start:stop], ratio * items))
            for shelves, low, high in ((self.light, start, cut), (self.heavy, cut, stop)):
                if low < high:
                    lengths, left = cells.lengths[low:high].tolist(), cells.sizes[low:high].tolist()
                    shelves.append(_Shelf(packed, items, lengths, left, low, list(range(high - low + 1))))
        self.light.sort(key=lambda shelf: -shelf.items)
        self.heavy.sort(key=lambda shelf: -shelf.lengths[-1])
        self.all = self.heavy + self.light
        self.plain = not self.light  # nothing to steer: first-fit-decreasing
        light_items = sum(shelf.items * sum(shelf.left) for shelf in self.light)
        self.reserve = sum(map(_Shelf.tokens, self.light)) / light_items if reserve and light_items else 0.0

    def patterns(self) -> list[_Pattern]:
        """Packs until nothing is left."""
        patterns = []
        while self.tokens_left:
            taken = self._pack()
            # The same choices would be made again while every cell of the pack has enough samples.
            times = 1 + min(shelf.left[rank - 1] // number for shelf, rank, number in taken.values())
            for shelf, rank, number in taken.values():
                self._remove(shelf, rank, number * (times - 1))
            for shelf, _, _ in taken.values():
                shelf.trim()
            if not all(shelf.left for shelf, _, _ in taken.values()):
                self.heavy, self.light, self.all = (
                    [shelf for shelf in shelves if shelf.left] for shelves in (self.heavy, self.light, self.all)
                )
            patterns.append(_Pattern([(cell, number) for cell, (_, _, number) in taken.items()], times))
        return patterns

    def _pack(self) -> dict[int, tuple[_Shelf, int, int]]:
        """One pack, removed from the shelves: cell → (shelf, rank, number of samples)."""
        ratio = self.tokens_left / self.items_left if self.items_left else 0.0
        room, free, items = self.capacity, self.free, 0
        due = min(self.limit, self.capacity / ratio) if self.reserve and ratio else 0.0
        spare = self.capacity - due * ratio if due else 0.0  # tokens that items of this ratio cannot fill
        taken: dict[int, tuple[_Shelf, int, int]] = {}
        while True:
            ahead = self.capacity - room > ratio * items  # more tokens than its items call for
            if ahead:
                choice = self._most_items(room, free)
            else:
                choice = self._longest(self.heavy, room - spare, free, due - items)
            choice = choice or self._longest(self.all, room, free, 0.0)
            if choice is None:
                return taken
            shelf, rank = choice
            length = shelf.lengths[rank - 1]
            number, most = 1, min(shelf.left[rank - 1], room // length)
            room -= length
            free -= shelf.need
            items += shelf.items
            # The same sample would be chosen until the balance tips or it no longer fits: skip the search.
            while (
                number < most
                and (self.plain or (ahead and self.capacity - room > ratio * items))
                and (free - shelf.need) & self.guards == self.guards
            ):
                number += 1
                room -= length
                free -= shelf.need
                items += shelf.items
            cell = shelf.first + rank - 1
            taken[cell] = (shelf, rank, number + (taken[cell][2] if cell in taken else 0))
            self._remove(shelf, rank, number)

    def _longest(self, shelves: list[_Shelf], room: float, free: int, due: float) -> tuple[_Shelf, int] | None:
        """The longest sample that leaves the reserve for each of the `due` items, less its own."""
        best, length = None, 0
        for shelf in shelves:
            if (
                shelf.lengths[0] <= room
                and shelf.lengths[-1] > length
                and (free - shelf.need) & self.guards == self.guards
            ):
                rank = shelf.longest(room - self.reserve * (due - shelf.items) if due > shelf.items else room)
                if rank and shelf.lengths[rank - 1] > length:
                    best, length = (shelf, rank), shelf.lengths[rank - 1]
        return best

    def _most_items(self, room: int, free: int) -> tuple[_Shelf, int] | None:
        """The light sample with most items, of those the longest."""
        for shelf in self.light:
            fits = shelf.lengths[0] <= room and (free - shelf.need) & self.guards == self.guards
            if fits and (rank := shelf.longest(room)):
                return shelf, rank
        return None

    def _remove(self, shelf: _Shelf, rank: int, number: int) -> None:
        self.tokens_left -= number * shelf.lengths[rank - 1]
        self.items_left -= number * shelf.items
        shelf.left[rank - 1] -= number
        if shelf.left[rank - 1] == 0:
            shelf.below[rank] = rank - 1


def _number(patterns: list[_Pattern]) -> int:
    return sum(pattern.times for pattern in patterns)


def _packs(patterns: list[_Pattern], cells: _Cells) -> Packs:
    """Samples for the patterns: every pack takes the next samples of its cells."""
    number = np.array([number for pattern in patterns for _ in range(pattern.times) for _, number in pattern.cells])
    cell = np.array([cell for pattern in patterns for _ in range(pattern.times) for cell, _ in pattern.cells])
    pack_sizes = np.repeat(
        [sum(number for _, number in pattern.cells) for pattern in patterns], [pattern.times for pattern in patterns]
    )
    slots = np.repeat(cell, number)
    order = np.empty(len(slots), np.int64)
    order[np.argsort(slots, kind="stable")] = cells.order  # cells are numbered in the order of their samples
    return Packs(order, np.concatenate([[0], np.cumsum(pack_sizes)]).astype(np.int64))
