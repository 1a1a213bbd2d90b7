"""First-fit-decreasing without open packs: each pack is filled completely before the next one is begun.

    lengths (n,) ──▶ Cells ──▶ shelves ──one pack at a time──▶ patterns ──▶ order (n,), starts (p + 1,)
    needs (n, m)     equal     cells with                      a pack and
                     samples   equal needs                     how often

A sample goes into the first pack that has room for it, so, seen from the packs, the first one gets the longest sample,
then the longest that still fits, and so on: what first-fit-decreasing does with all packs open comes out without ever
looking at a full pack again. Lengths are small integers, so equal samples form cells, and a pack whose cells have
samples left is repeated at no cost.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Fields:
    """Several small numbers in one integer, so that one subtraction compares them all.

    Above each field is a guard bit, which is set in `full` and borrowed by a field that would go below zero.
    """

    def __init__(self, most: list[int]) -> None:
        """Fields for numbers up to `most`; `full` holds these."""
        bits = [number.bit_length() + 1 for number in most]
        self.shifts = [sum(bits[:field]) for field in range(len(bits))]
        self.masks = [(1 << bit - 1) - 1 for bit in bits]
        self.guards = sum(1 << shift + bit - 1 for shift, bit in zip(self.shifts, bits, strict=True))
        self.full = self.guards + self.of(most)

    def of(self, numbers: list[int]) -> int:
        """One number a field."""
        return sum(number << shift for number, shift in zip(numbers, self.shifts, strict=True))

    def rows(self, numbers: np.ndarray) -> list[int]:
        """The same for each row of (n, fields)."""
        packed = numbers.astype(object) << np.array(self.shifts, object)  # more than 64 bits, where limits are large
        return packed.sum(axis=1).tolist()

    def fit(self, numbers: int, room: int) -> bool:
        """Whether no field of `room` is below that of `numbers`."""
        return (room - numbers) & self.guards == self.guards

    def field(self, field: int, packed: int) -> int:
        """The number in a field."""
        return packed >> self.shifts[field] & self.masks[field]


class Cells(NamedTuple):
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
    def of(lengths: np.ndarray, needs: np.ndarray) -> Cells:
        order = np.lexsort((lengths, *needs.T))
        starts = _runs(np.column_stack([lengths, needs])[order])
        first = order[starts]
        return Cells(order, np.diff(starts, append=len(order)), lengths[first], needs[first])


def _runs(rows: np.ndarray) -> np.ndarray:
    """Where runs of equal rows (c, k) start."""
    differs = np.ones(len(rows), bool)
    differs[1:] = (np.diff(rows, axis=0) != 0).any(axis=1)
    return np.flatnonzero(differs)


class Pattern(NamedTuple):
    """A pack as (cell, samples) pairs, and how often it occurs."""

    cells: list[tuple[int, int]]
    times: int


def number_of(patterns: list[Pattern]) -> int:
    """Packs of the patterns."""
    return sum(pattern.times for pattern in patterns)


def arrange(patterns: list[Pattern], cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Order (n,) and starts (p + 1,) of the packs: each takes the next samples of its cells."""
    packs = [pattern.cells for pattern in patterns for _ in range(pattern.times)]
    taken = np.array([pair for pack in packs for pair in pack], np.int64).reshape(-1, 2)
    slots = np.repeat(taken[:, 0], taken[:, 1])
    order = np.empty(len(slots), np.int64)
    order[np.argsort(slots, kind="stable")] = cells.order  # cells are numbered in the order of their samples
    sizes = [sum(number for _, number in pack) for pack in packs]
    return order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@dataclass(slots=True)
class Shelf:
    """Cells with the same needs, by ascending length.

    need: items of each sample, as `Fields`; needs: the same, one a modality
    lengths: tokens of the samples of each cell; left: how many are left; first: number of the first cell
    below: rank of the longest cell that is not empty, at or below each rank (a union-find); ranks start at 1, 0 is none
    """

    need: int
    needs: list[int]
    lengths: list[int]
    left: list[int]
    first: int
    below: list[int]

    def longest(self, room: float) -> int:
        """Rank of the longest sample with at most `room` tokens; 0 if there is none."""
        below = self.below
        rank = bisect_right(self.lengths, room)
        while below[rank] != rank:
            below[rank] = below[below[rank]]
            rank = below[rank]
        return rank

    def remove(self, rank: int, number: int) -> None:
        """Takes samples of a cell away."""
        self.left[rank - 1] -= number
        if self.left[rank - 1] == 0:
            self.below[rank] = rank - 1

    def trim(self) -> None:
        """Removes empty cells at the long end."""
        while self.left and not self.left[-1]:
            self.lengths.pop()
            self.left.pop()
            self.below.pop()


class Packer:
    """First-fit-decreasing: a pack takes the longest sample that still fits until none does."""

    def __init__(self, cells: Cells, capacity: int, units: np.ndarray, kinds: np.ndarray | None = None) -> None:
        """For cells of c different samples with m needs.

        Args:
            capacity: tokens of a pack.
            units: (m,) int64 most needs of a pack.
            kinds: (c,) int; cells of different kinds come onto different shelves.
        """
        self.capacity = capacity
        self.tokens_left = int(cells.sizes @ cells.lengths)
        self.fields = Fields(units.tolist())
        classes = cells.needs if kinds is None else np.column_stack([cells.needs, kinds])
        self.shelves: list[Shelf] = []
        for start, stop in pairwise([*_runs(classes).tolist(), len(cells.sizes)]):
            needs = cells.needs[start].tolist()
            lengths, left = cells.lengths[start:stop].tolist(), cells.sizes[start:stop].tolist()
            self.shelves.append(Shelf(self.fields.of(needs), needs, lengths, left, start, list(range(len(left) + 1))))

    def patterns(self) -> list[Pattern]:
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
                self._clear()
            patterns.append(Pattern([(cell, number) for cell, (_, _, number) in taken.items()], times))
        return patterns

    def _pack(self) -> dict[int, tuple[Shelf, int, int]]:
        """One pack, removed from the shelves: cell → (shelf, rank, number of samples)."""
        room, free = self.capacity, self.fields.full
        taken: dict[int, tuple[Shelf, int, int]] = {}
        while choice := self._choose(room, free):
            shelf, rank = choice
            length = shelf.lengths[rank - 1]
            number, most = 1, shelf.left[rank - 1]
            room -= length
            free -= shelf.need
            while (
                number < most
                and length <= room
                and self.fields.fit(shelf.need, free)
                and self._again(shelf, rank, room, free)
            ):
                number += 1
                room -= length
                free -= shelf.need
            cell = shelf.first + rank - 1
            taken[cell] = (shelf, rank, number + (taken[cell][2] if cell in taken else 0))
            self._remove(shelf, rank, number)
        return taken

    def _choose(self, room: int, free: int) -> tuple[Shelf, int] | None:
        """The next sample for a pack with this much room, as its shelf and rank."""
        return self._longest(self.shelves, room, free)

    def _again(self, shelf: Shelf, rank: int, room: int, free: int) -> bool:
        """Whether `_choose` would take another sample of the cell that it took last, given that one fits."""
        return True

    def _longest(self, shelves: list[Shelf], room: int, free: int) -> tuple[Shelf, int] | None:
        best, length = None, 0
        for shelf in shelves:
            if (
                shelf.lengths[0] <= room
                and shelf.lengths[-1] > length
                and self.fields.fit(shelf.need, free)
                and (rank := shelf.longest(room))
                and shelf.lengths[rank - 1] > length
            ):
                best, length = (shelf, rank), shelf.lengths[rank - 1]
        return best

    def _remove(self, shelf: Shelf, rank: int, number: int) -> None:
        self.tokens_left -= number * shelf.lengths[rank - 1]
        shelf.remove(rank, number)

    def _clear(self) -> None:
        """Takes away empty shelves."""
        self.shelves = [shelf for shelf in self.shelves if shelf.left]
