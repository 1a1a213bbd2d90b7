"""Random numbers as a function of what they are for: a hash of (seed, source, epoch, row, …).

A library generator's stream may change between versions and must be replayed to reach a position; a hash of counters
is the same everywhere and reaches any position at once (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3").
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio: the increment of SplitMix64."""


def mix(words: np.ndarray | np.uint64) -> np.ndarray:
    """uint64 → uint64 bijection in which every input bit changes every output bit with probability about ½.

    The output function of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with
    the constants of Stafford's variant 13): the i-th output of the generator is ``mix(seed + i · GOLDEN)``, i from 1.
    """
    words = np.asarray(words, np.uint64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash64(*keys: int | str | np.ndarray) -> np.ndarray:
    """uint64 hash of a sequence of keys, each a number, a name or an integer array; arrays broadcast."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = mix((state ^ _word(key)) + GOLDEN)
    return state if any(isinstance(key, np.ndarray) for key in keys) else state[0]


def shuffled(number: int, *keys: int | str | np.ndarray) -> np.ndarray:
    """(number,) int64 permutation of 0 … number - 1 that depends on the keys only."""
    return np.argsort(hash64(*keys, np.arange(number)), kind="stable")


def _word(key: int | str | np.ndarray) -> np.ndarray | np.uint64:
    if isinstance(key, str):
        return np.uint64(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little"))
    if isinstance(key, np.ndarray):
        return key.astype(np.uint64)
    return np.uint64(int(key) % 2**64)
