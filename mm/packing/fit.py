"""Which samples share a pack: policies of bin packing with a capacity in tokens and limits on items.

    lengths (n,)  ──policy──▶ Packs(order (n,), starts (p + 1,))
    counts (n, M)             pack i is order[starts[i]:starts[i + 1]]

A policy packs whole samples: no text and no media item is cut here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mm.packing.best_fit import SteeredPacker
from mm.packing.shelves import Cells, Fields, Packer, arrange, number_of

RESOLUTION = 128
"""Limits above this (patches, frames) are counted in this many units, rounded up, so that samples form few shelves."""

RESERVES = (0.3, 0.0)
"""Ways of `SteeredPacker` that best-fit tries. Packs are about as few with 0.25 to 0.5 for the first."""

CLOSE_ENOUGH = 1.01
"""Within 1 % of the lower bound, best-fit tries no other way."""

OPEN_PACKS = 8
"""Packs that next-8-fit keeps open. With 2, 4, 8 and 64 of them the benchmark's packs fill to 93, 98, 98.4, 98.5 %."""


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


def best_fit(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Packs of at most `capacity` tokens and `limits` items, few because samples are chosen by both.

    Where items are limited, the fewest packs of `SteeredPacker` and first-fit-decreasing, or the first that are within
    1 % of the lower bound; else the packs of first-fit-decreasing.

    Args:
        lengths: (n,) int, tokens of each sample, at least 1.
        counts: (n, M) int, items of each sample per modality.
        limits: (M,) int, most items per modality in a pack.

    Raises:
        ValueError: a sample fits no pack, or the arrays disagree.
    """
    lengths, needs, units = _in_units(*_checked(lengths, capacity, counts, limits))
    cells = Cells.of(lengths, needs)
    enough = CLOSE_ENOUGH * lower_bound(lengths, capacity, needs, units)
    steered = [SteeredPacker(cells, capacity, units, quantile) for quantile in (RESERVES if len(units) else ())]
    found = []
    for packer in (*steered, Packer(cells, capacity, units)):
        found.append(packer.patterns())
        if number_of(found[-1]) <= enough:
            break
    return Packs(*arrange(min(found, key=number_of), cells))


def first_fit_decreasing(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Longest first, every sample into the first pack that has room for it (Johnson 1973). Arguments as `best_fit`.

    Limits are kept, but play no part in which sample comes next: where one binds, `best_fit` needs far fewer packs.
    """
    lengths, needs, units = _in_units(*_checked(lengths, capacity, counts, limits))
    cells = Cells.of(lengths, needs)
    return Packs(*arrange(Packer(cells, capacity, units).patterns(), cells))


def next_8_fit(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Nearly in order: a sample goes into the first of the 8 newest packs that has room for it, or begins a new one.

    Packs come in the order in which they were begun, so a sample can be at most 7 packs ahead of one that came before
    it; within a pack samples keep their order. (Next-k-fit, Johnson 1974.) Arguments as `best_fit`.
    """
    return _next_fit(OPEN_PACKS, capacity, *_checked(lengths, capacity, counts, limits))


def in_order(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Next-fit: samples keep their order; one that does not fit begins a new pack. Arguments as `best_fit`."""
    return _next_fit(1, capacity, *_checked(lengths, capacity, counts, limits))


def one_per_pack(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
) -> Packs:
    """Every sample alone, as training without packing would have it. Arguments as `best_fit`."""
    lengths, _, _ = _checked(lengths, capacity, counts, limits)
    return Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))


class Pack(Protocol):
    """Packs samples; arguments as `best_fit`."""

    def __call__(
        self, lengths: np.ndarray, capacity: int, counts: np.ndarray | None, limits: np.ndarray | None, /
    ) -> Packs: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to pack, and whether it is there to keep the order of the samples.

    displacement: most packs by which a sample may be ahead of one that came before it. None: order is of no account,
        and samples and packs should be shuffled
    """

    pack: Pack
    displacement: int | None = None

    @property
    def keeps_order(self) -> bool:
        """Whether samples should reach `pack`, and packs training, in the order of the sources (a curriculum)."""
        return self.displacement is not None

    def __call__(
        self, lengths: np.ndarray, capacity: int, counts: np.ndarray | None = None, limits: np.ndarray | None = None
    ) -> Packs:
        return self.pack(lengths, capacity, counts, limits)


POLICIES = {
    "best-fit": Policy(best_fit),
    "first-fit-decreasing": Policy(first_fit_decreasing),
    "next-8-fit": Policy(next_8_fit, displacement=OPEN_PACKS - 1),
    "in-order": Policy(in_order, displacement=0),
    "one-per-pack": Policy(one_per_pack),
}


def _checked(
    lengths: np.ndarray, capacity: int, counts: np.ndarray | None, limits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (n,), counts (n, m) and limits (m,), int64, for the m modalities that occur."""
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
    return lengths, counts[:, occurs], limits[occurs]


def _in_units(lengths: np.ndarray, counts: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (n,), needs (n, m) in units of the limits, rounded up, and units (m,), at most `RESOLUTION`."""
    coarse = limits > RESOLUTION
    needs = np.where(coarse, -(-counts * RESOLUTION // np.maximum(limits, 1)), counts)
    return lengths, needs, np.where(coarse, RESOLUTION, limits)


def _next_fit(number: int, capacity: int, lengths: np.ndarray, counts: np.ndarray, limits: np.ndarray) -> Packs:
    """First-fit into the `number` newest packs."""
    fields = Fields([capacity, *limits.tolist()])
    rooms: list[int] = []  # of the open packs, the oldest first
    begun = 0
    pack_of = []
    for size in fields.rows(np.column_stack([lengths, counts])):
        place = next((place for place, room in enumerate(rooms) if fields.fit(size, room)), None)
        if place is None:
            begun += 1
            rooms = [*rooms, fields.full][-number:]
            place = len(rooms) - 1
        rooms[place] -= size
        pack_of.append(begun - len(rooms) + place)
    sizes = np.bincount(np.array(pack_of, np.int64), minlength=begun)
    order = np.argsort(pack_of, kind="stable")
    return Packs(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
