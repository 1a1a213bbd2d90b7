"""A model looks at every sample of an index, and what it says becomes a column: codes, log-probabilities, scores.

    shard ─rows─▶ batches of rows ─Scorer─▶ a value each ─▶ columns/<name>-<fingerprint>/<shard>.parquet

One file a shard, written whole: a pass that was killed goes on with the shards that are missing, and several processes,
or several machines on one file system, share the work.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from mm.data import columns
from mm.data.columns import Row
from mm.data.index import Index

GROUP = 256
"""Rows of a column that are decoded at once where training reads it in shuffled order."""


class Scorer(ABC):
    """What computes the values of a column. Pickles small: it loads its weights in the process in which it works.

    name, type: of the column
    fingerprint: identity of everything that the values depend on, beside the samples
    """

    name: str
    type: pa.DataType
    fingerprint: str

    def prepare(self, index: Index, progress: bool = True) -> None:  # noqa: B027  (most have nothing to prepare)
        """What has to be done before the pass over an index, in this process; `fingerprint` is known afterwards."""

    def told(self, index: Index) -> str:
        """A line about the column of an index."""
        return f"{index.card.name}/{index.split}: column {self.name!r} of {index.rows:,} samples"

    @abstractmethod
    def values(self, rows: Sequence[Row]) -> Sequence[Any]:
        """A value for each row, None for one that has none. Does not depend on which rows are asked for together."""


def score_index(
    index: Index, scorer: Scorer, batch: int = 32, processes: int | None = 0, progress: bool = True
) -> None:
    """Computes the column of a scorer where it is missing; see `mm.data.columns.load` and `ColumnReader` for reading.

    The scorer is prepared.

    Args:
        batch: rows that are looked at together.
        processes: how many work in parallel, each with weights of its own; 0 for this one only.
    """
    values = functools.partial(_in_batches, scorer, batch)
    columns.ensure(index, scorer.name, scorer.fingerprint, values, scorer.type, processes, progress, GROUP)


def _in_batches(scorer: Scorer, batch: int, rows: Iterator[Row]) -> Iterator[Any]:
    while chosen := list(islice(rows, batch)):
        values = scorer.values(chosen)
        assert len(values) == len(chosen)
        yield from values
