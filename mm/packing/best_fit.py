"""Best-fit with two limits: tokens and items of every pack run out together.

Where a limit binds, first-fit-decreasing spends all text in the first packs and leaves packs full of items but empty of
tokens to the end. Choosing by dot product or distance to what a pack has left (Panigrahy et al. 2011, "Heuristics for
Vector Bin Packing") does the same, for the few long samples and the many short ones are taken apart. What helps is to
keep the ratio of tokens to items of the whole in every pack, and so in the rest.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from mm.packing.shelves import Cells, Packer, Shelf


class SteeredPacker(Packer):
    """Fills packs so that tokens run out together with the items of one modality, the one whose limit is tightest.

    ρ is tokens per item of all that is left, so a pack is due min(limit, ⌈capacity / ρ⌉) items. Samples of n items and
    L ≥ ρ·n tokens at the start are heavy, the others light. A pack with more tokens than its items call for takes the
    light sample with most items, else the longest heavy one: of either kind one that leaves a reserve of tokens for
    each item still due. If none does, the reserve is given up, first for light samples.

    Where tokens bind, a pack begins with the longest heavy sample and is due only the items that the reserve allows.
    Where items bind, heavy samples that are too long for the reserve wait for the shortest light ones, at the end.
    """

    def __init__(self, cells: Cells, capacity: int, units: np.ndarray, quantile: float) -> None:
        """As `Packer`; the reserve is the tokens per item that this part of the light samples does with, 0 for 0."""
        totals = cells.sizes @ cells.needs
        self.steering = int(np.argmax(totals / units))
        items = cells.needs[:, self.steering]
        self.limit, self.items_left = int(units[self.steering]), int(totals[self.steering])
        is_light = cells.lengths * self.items_left < items * (cells.sizes @ cells.lengths)
        super().__init__(cells, capacity, units, kinds=is_light)

        self.heavy = [shelf for shelf in self.shelves if not is_light[shelf.first]]
        self.light = [shelf for shelf in self.shelves if is_light[shelf.first]]
        self.light.sort(key=lambda shelf: -shelf.needs[self.steering])
        ratios = np.repeat(cells.lengths[is_light] / items[is_light], cells.sizes[is_light])
        self.reserve = float(np.quantile(ratios, quantile)) if quantile and len(ratios) else 0.0
        self.ratio = 0.0
        self.due = 0

    def _pack(self) -> dict[int, tuple[Shelf, int, int]]:
        self.ratio = self.tokens_left / self.items_left if self.items_left else 0.0
        self.due = min(self.limit, ceil(self.capacity / self.ratio)) if self.ratio else 0
        return super()._pack()

    def _choose(self, room: int, free: int) -> tuple[Shelf, int] | None:
        items = self._items(free)
        if self.capacity - room > self.ratio * items:
            choice = self._most_items(room, free, self.due - items) or self._most_items(room, free, 0)
        elif room == self.capacity < self.limit * self.ratio:
            choice = self._first(room, free)
        else:
            choice = self._heaviest(room, free, self.due - items)
        return choice or self._longest(self.shelves, room, free)

    def _first(self, room: int, free: int) -> tuple[Shelf, int] | None:
        """The longest heavy sample, and `due` as far as it leaves room for."""
        choice = self._longest(self.heavy, room, free)
        if choice and self.reserve:
            shelf, rank = choice
            room -= shelf.lengths[rank - 1]
            self.due = min(self.due, shelf.needs[self.steering] + int(room / self.reserve))
        return choice

    def _again(self, shelf: Shelf, rank: int, room: int, free: int) -> bool:
        # Still ahead, still light, and no longer sample has come to leave the reserve.
        length, items, need = shelf.lengths[rank - 1], self._items(free), shelf.needs[self.steering]
        return (
            self.reserve * need <= length < self.ratio * need
            and self.capacity - room > self.ratio * items
            and room - length >= self.reserve * (self.due - items - need)
        )

    def _heaviest(self, room: int, free: int, due: int) -> tuple[Shelf, int] | None:
        """The longest heavy sample that leaves the reserve."""
        best, length = None, 0
        for shelf in self.heavy:
            if shelf.lengths[-1] > length:
                rank = self._rank(shelf, room, free, due)
                if rank and shelf.lengths[rank - 1] > length:
                    best, length = (shelf, rank), shelf.lengths[rank - 1]
        return best

    def _most_items(self, room: int, free: int, due: int) -> tuple[Shelf, int] | None:
        """The light sample with most items, of those the longest, that leaves the reserve."""
        for shelf in self.light:
            if shelf.lengths[0] <= room and (rank := self._rank(shelf, room, free, due)):
                return shelf, rank
        return None

    def _rank(self, shelf: Shelf, room: int, free: int, due: int) -> int:
        """Rank of the longest sample that leaves the reserve for each item `due` but its own; 0 if none does."""
        rest = due - shelf.needs[self.steering]
        most = room - self.reserve * rest if rest > 0 else room
        return shelf.longest(most) if self.fields.fit(shelf.need, free) else 0

    def _items(self, free: int) -> int:
        """Items of the steering modality in a pack with this room."""
        return self.limit - self.fields.field(self.steering, free)

    def _remove(self, shelf: Shelf, rank: int, number: int) -> None:
        super()._remove(shelf, rank, number)
        self.items_left -= number * shelf.needs[self.steering]

    def _clear(self) -> None:
        super()._clear()
        self.heavy = [shelf for shelf in self.heavy if shelf.left]
        self.light = [shelf for shelf in self.light if shelf.left]
