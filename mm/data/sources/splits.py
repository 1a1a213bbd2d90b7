"""Train, validation, instruct and held-out splits of drawings that share nothing: no group, no near-duplicate."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image as PillowImage

from mm.data.sources.writer import rank

SPLITS = ("train", "validation", "instruct", "heldout")
SHARES = {"heldout": 0.175, "instruct": 0.125, "validation": 0.075}
"""Of the drawings of each category; train takes the rest."""
NEAR_SHAPE = 10
"""Bits of 64 by which the perceptual hashes of near-duplicates differ at most."""
LONGEST = 4096
"""Pixels of a side from which on a picture is shrunk before its colours are taken: a square of 60,000 × 60,000 pixels
around a strip would take 14 GB."""
NEAR_COLOURS = 14
"""Mean difference of the colours of near-duplicates at most, of 255."""


class Grouped(Protocol):
    """A picture that can be split off.

    group: what it must not be separated from, such as the other pictures of its series
    hash: 64-bit perceptual hash, which sees shapes in grey
    colours: (16, 16, 3) uint8, see `colours_of`
    """

    @property
    def key(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def hash(self) -> int: ...
    @property
    def colours(self) -> np.ndarray: ...


Picture = TypeVar("Picture", bound=Grouped)


def split_by_group(pictures: Sequence[Picture], seed: int) -> dict[str, list[Picture]]:
    """The pictures of each split, shuffled. A group goes to one split whole; each category is shared out on its own.

    Within a category, groups come in an order that only their names and the seed decide. They fill held-out, then
    instruct, then validation, up to `SHARES`, and train takes the rest. A group larger than half of a share goes to
    train: it would be most of that split by itself.
    """
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.group].append(picture)
    by_category: dict[str, list[str]] = defaultdict(list)
    for name, members in groups.items():
        by_category[_main_category(members)].append(name)

    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for names in by_category.values():
        total = sum(len(groups[name]) for name in names)
        room = {split: share * total for split, share in SHARES.items()}
        for name in sorted(names, key=lambda name: rank(seed, "split", name)):
            size = len(groups[name])
            fitting = [split for split, share in SHARES.items() if size <= min(room[split], share * total / 2)]
            split = fitting[0] if fitting else "train"
            if fitting:
                room[split] -= size
            splits[split] += groups[name]
    return {
        split: sorted(members, key=lambda picture: rank(seed, "order", picture.key))
        for split, members in splits.items()
    }


def _main_category(members: Sequence[Grouped]) -> str:
    counts = Counter(picture.category for picture in members)
    return max(counts, key=lambda category: (counts[category], category))


def without_near_duplicates(splits: Mapping[str, Sequence[Picture]]) -> dict[str, list[Picture]]:
    """The splits, each without what resembles a picture of those before it: held-out, instruct, validation, train.

    The same picture may stand under several authors and folders, so groups alone do not separate splits.
    """
    kept: dict[str, list[Picture]] = {}
    for split in (*SHARES, "train"):
        kept[split] = _unlike(splits.get(split, ()), [picture for others in kept.values() for picture in others])
    return kept


def _unlike(pictures: Sequence[Picture], others: Sequence[Picture]) -> list[Picture]:
    if not others:
        return list(pictures)
    hashes = np.array([other.hash for other in others], dtype=np.uint64)
    colours = np.stack([other.colours for other in others]).astype(np.int16)
    return [picture for picture in pictures if not _resembles(picture, hashes, colours).any()]


def _resembles(picture: Grouped, hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(N,) bool. Grey shapes alone would call half of all flags one picture; colours alone, all thin line drawings."""
    shapes = np.bitwise_count(hashes ^ np.uint64(picture.hash))
    differences = np.abs(colours - picture.colours).mean(axis=(1, 2, 3))
    return (shapes <= NEAR_SHAPE) & (differences <= NEAR_COLOURS)


def colours_of(picture: PillowImage.Image) -> np.ndarray:
    """(16, 16, 3) uint8: the RGB picture, centred on a white square and shrunk."""
    side = max(picture.size)
    if side > LONGEST:
        width, height = (max(1, round(length * LONGEST / side)) for length in picture.size)
        picture, side = picture.resize((width, height), PillowImage.Resampling.BOX), LONGEST
    square = PillowImage.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((16, 16), PillowImage.Resampling.BOX))
