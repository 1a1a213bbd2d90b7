"""Random numbers for tokens as a function of what they are for: a hash of (key of the token, purpose, column).

A generator's numbers depend on what was drawn before, and so on the micro-batch and the process. A hash of counters
gives a token the same noise whatever else is computed with it, and again when a block is computed a second time for its
backward (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 23
"""Bits of a drawn number: with the half that is added to it, as many as float32 holds exactly."""


def hashed(words: Tensor) -> Tensor:
    """int64 → int64 bijection in which every input bit changes every output bit with probability about ½.

    The output function of SplitMix64 (Steele, Lea & Flood 2014, with the constants of Stafford's variant 13).
    """
    words = words + GOLDEN
    words = (words ^ _shifted(words, 30)) * FIRST
    words = (words ^ _shifted(words, 27)) * SECOND
    return words ^ _shifted(words, 31)


def uniform(keys: Tensor, columns: int, purpose: int) -> Tensor:
    """(T, columns) float32 in (0, 1), independent for every key, column and purpose.

    Args:
        keys: (T,) int64, see `mm.layers.layout.Layout.keys`.
        purpose: number of the layer, or of what else is drawn for the same tokens.
    """
    of_token = hashed(keys + hashed(torch.full_like(keys[:1], purpose)))
    words = hashed(of_token[:, None] + torch.arange(columns, device=keys.device))
    return (_shifted(words, 64 - BITS).float() + 0.5) / 2**BITS


def logistic(keys: Tensor, columns: int, purpose: int) -> Tensor:
    """(T, columns) float32 from the logistic distribution: the difference of two Gumbel variables."""
    drawn = uniform(keys, columns, purpose)
    return drawn.log() - (-drawn).log1p()


def dropout(hidden: Tensor, share: float, keys: Tensor, purpose: int) -> Tensor:
    """(T, D) with a share of the values set to 0 and the others scaled by 1 / (1 − share) (Srivastava et al. 2014)."""
    kept = uniform(keys, hidden.shape[1], purpose) >= share
    return hidden * (kept.to(hidden.dtype) / (1 - share))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right with zeros coming in, as unsigned numbers are."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
