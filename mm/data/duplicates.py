"""Which of many pictures, recordings or texts are the same, and which pictures nearly so.

Exact: equal 64-bit digests of the content. Near: perceptual hashes within some of their 64 bits and small colour
thumbnails within `NEAR_COLOURS`, as in `mm.data.sources.splits`.

The near pairs are found without comparing all: a hash is cut into four bands of 16 bits, and two hashes within 11 bits
differ by at most 2 in some band (pigeonhole), so looking up every band with none, one or two bits flipped misses none
(multi-index hashing, Norouzi et al. 2012).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mm.data.sources.splits import NEAR_COLOURS

BANDS = 4
BAND_BITS = 64 // BANDS
NEAR_BITS = 8
"""Bits by which the hashes of near-duplicates differ at most. Below what splits are kept apart by, `NEAR_SHAPE`: a
picture that is saved once more may come nearer to another by some bits."""
MOST_BITS = 11
"""Largest distance that can be asked for."""
MOST_COMPARED = 20_000_000
"""Pairs of colour thumbnails that are compared at most: a set of a million blank pages would never end."""

_LOOKED_UP = 1 << 20  # pairs of hashes in memory at a time
_COMPARED = 1 << 13  # pairs of thumbnails in memory at a time


class NearPairs(NamedTuple):
    """Pairs of near-duplicates.

    pairs: (p, 2) int64 picture numbers, the lower first, each pair once
    complete: False where `MOST_COMPARED` was reached
    """

    pairs: np.ndarray
    complete: bool


def equal_groups(digests: np.ndarray) -> list[np.ndarray]:
    """Numbers of the items of each digest that occurs more than once, ascending; digest 0 means nothing.

    Args:
        digests: (n,) uint64.
    """
    order = np.argsort(digests, kind="stable")
    cuts = np.flatnonzero(np.diff(digests[order])) + 1
    groups = np.split(order, cuts)
    return [group for group in groups if len(group) > 1 and digests[group[0]]]


def near_pairs(hashes: np.ndarray, colours: np.ndarray, bits: int = NEAR_BITS) -> NearPairs:
    """All pairs of pictures that resemble each other.

    Args:
        hashes: (n,) uint64 perceptual hashes, see `mm.media.perceptual_hash`.
        colours: (n, 16, 16, 3) uint8 thumbnails, see `mm.data.sources.splits.colours_of`.
        bits: by which hashes differ at most, 0 to `MOST_BITS`.
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"near-duplicates within {bits} bits: expected 0 to {MOST_BITS}")
    flat = colours.reshape(len(colours), int(np.prod(colours.shape[1:])))
    means = colours.mean(axis=(1, 2), dtype=np.float32)  # differ at most as much as the thumbnails do
    found: list[np.ndarray] = []
    compared, complete = 0, True
    for pairs in _of_like_shape(hashes, bits):
        first, second = pairs.T
        pairs = pairs[np.abs(means[first] - means[second]).mean(axis=1) <= NEAR_COLOURS]
        if compared + len(pairs) > MOST_COMPARED:
            pairs, complete = pairs[: MOST_COMPARED - compared], False
        compared += len(pairs)
        for start in range(0, len(pairs), _COMPARED):
            first, second = pairs[start : start + _COMPARED].T
            difference = np.abs(flat[first].astype(np.int16) - flat[second]).mean(axis=1)
            found.append(pairs[start : start + _COMPARED][difference <= NEAR_COLOURS])
        if not complete:
            break
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    return NearPairs(np.unique(pairs, axis=0), complete)


def _of_like_shape(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """(p, 2) pairs within so many bits, some at a time. A pair may come once for every band in which it is near."""
    numbers = np.arange(len(hashes))
    for band in range(BANDS):
        values = ((hashes >> np.uint64(band * BAND_BITS)) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
        order = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[order], np.arange(2**BAND_BITS + 1))
        for flipped in _flips(bits // BANDS):
            # The pair is symmetric: look up from the side whose highest flipped bit is 0, or, unflipped, from both.
            asking = numbers[(values >> max(flipped.bit_length() - 1, 0)) & 1 == 0] if flipped else numbers
            for first, second in _expanded(asking, values[asking] ^ flipped, starts, order):
                near = np.bitwise_count(hashes[first] ^ hashes[second]) <= bits
                near &= first < second if not flipped else True
                pairs = np.stack([first[near], second[near]], axis=1)
                yield np.sort(pairs, axis=1)


def _flips(most: int) -> Iterator[int]:
    """All band values with at most so many bits set."""
    for number in range(most + 1):
        for bits in itertools.combinations(range(BAND_BITS), number):
            yield sum(1 << bit for bit in bits)


def _expanded(
    asking: np.ndarray, buckets: np.ndarray, starts: np.ndarray, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every asking item with every item of its bucket, about `_LOOKED_UP` pairs at a time."""
    sizes = starts[buckets + 1] - starts[buckets]
    asking, buckets, sizes = asking[sizes > 0], buckets[sizes > 0], sizes[sizes > 0]
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, np.arange(_LOOKED_UP, ends[-1] if len(ends) else 0, _LOOKED_UP))
    for low, high in itertools.pairwise(np.unique([0, *cuts.tolist(), len(asking)]).tolist()):
        here = sizes[low:high]
        first = np.repeat(asking[low:high], here)
        within = np.arange(len(first)) - np.repeat(np.cumsum(here) - here, here)
        yield first, order[np.repeat(starts[buckets[low:high]], here) + within]
