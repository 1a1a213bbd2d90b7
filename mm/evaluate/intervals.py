"""Confidence intervals by a bootstrap over pictures: the questions of one picture are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
CHUNK = 256
"""Resamples held in memory at a time."""


def clustered_interval(
    values: np.ndarray, clusters: Sequence[str], seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, resampling whole clusters with replacement.

    Give differences of two figures on the same questions for a paired comparison.

    Args:
        values: (Q,) credit or difference per question
        clusters: Q picture ids
        seed: the same seed gives the same interval, for the same version of NumPy

    Raises:
        ValueError: fewer than two clusters say nothing about spread.
    """
    names, number = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"an interval over pictures needs two or more, found {len(names)}")
    sums = np.bincount(number, weights=values)
    sizes = np.bincount(number).astype(float)
    generator = np.random.Generator(np.random.Philox(seed))
    means = []
    for start in range(0, resamples, CHUNK):
        drawn = generator.multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=min(CHUNK, resamples - start)
        )
        means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
