"""Parquet files as Hugging Face hosts them: a row is a record, its columns are the fields.

    row group ──batches of rows──▶ Record(row number, {column: value})

A row cannot be read without its row group: the last ones stay in memory, or see `mm.data.rows`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.files import ShardChanged, ShardFile, ShardStat
from mm.data.shards import Place, Record, Scanned, Shard

ROW_GROUP_CACHE = 256 * 1024**2
"""Bytes of decoded row groups that a process keeps. The last one read is kept whatever its size."""
BATCH = 64
"""Rows of a row group that are decoded at a time. A damaged place costs those of its batch and all after it."""


class DamagedRows(ValueError):
    """Rows of a row group that cannot be decoded; the message says why."""


class ParquetShard(Shard):
    """A parquet file as Hugging Face hosts it: one row a record, fields are columns, the key is the row's number."""

    def __init__(self, file: ShardFile, expected: ShardStat | None = None, columns: Collection[str] = ()) -> None:
        super().__init__(file, expected)
        self.columns = frozenset(columns)
        self._parquet: pq.ParquetFile | None = None

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first row of every row group, and behind them that of all rows."""
        return list(itertools.accumulate(self.row_groups(), initial=0))

    def row_groups(self) -> list[int]:
        """Number of rows of every row group."""
        metadata = self.metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    @property
    def metadata(self) -> pq.FileMetaData:
        """The footer."""
        return self._open().metadata

    @property
    def schema(self) -> pa.Schema:
        """The columns that are read, in the order of the file."""
        schema = self._open().schema_arrow
        return pa.schema([field for field in schema if not self.columns or field.name in self.columns])

    def scan(self) -> Iterator[Scanned]:
        try:
            groups = len(self.starts) - 1
        except (pa.ArrowException, OSError) as error:
            _raise_if_disk(error)
            yield Scanned("", (0, 0), None, f"not a readable parquet file: {error}")
            return
        for group in range(groups):
            yield from self._scan_group(group)

    def _scan_group(self, group: int) -> Iterator[Scanned]:
        first, row = self.starts[group], 0
        try:
            for batch in self.batches(group):
                for fields in batch.to_pylist():
                    key = str(first + row)
                    yield Scanned(key, (group, row), Record(key, fields))
                    row += 1
        except DamagedRows as damage:
            lost = self.starts[group + 1] - first - row
            reason = f"damaged parquet file: {lost} rows of row group {group} are lost: {damage}"
            yield Scanned(str(first + row), (group, row), None, reason)

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, `BATCH` at a time.

        Raises:
            DamagedRows: some cannot be decoded; those before them were given.
            OSError: the disk or the network failed.
        """
        names = self.schema.names
        try:
            yield from self._open().iter_batches(BATCH, row_groups=[group], columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            _raise_if_disk(error)
            raise DamagedRows(str(error)) from error

    def _record(self, place: Place) -> Record:
        group, row = place
        if group >= len(self.starts) - 1:
            raise ShardChanged(f"{self.path}: no row group {group} in {len(self.starts) - 1}")
        table = _row_groups.get((self.path, self.expected, group, self.columns), lambda: self._read_group(group))
        if row >= table.num_rows:
            raise ShardChanged(f"{self.path}: no row {row} in row group {group}, which has {table.num_rows}")
        return Record(str(self.starts[group] + row), table.slice(row, 1).to_pylist()[0])

    def _read_group(self, group: int) -> pa.Table:
        """A row group as far as it can be decoded."""
        batches: list[pa.RecordBatch] = []
        with suppress(DamagedRows):
            for batch in self.batches(group):
                batches.append(batch)
        return pa.Table.from_batches(batches, None if batches else self.schema)

    def _open(self) -> pq.ParquetFile:
        if self._parquet is None:
            self._parquet = pq.ParquetFile(self.file.stream())
        return self._parquet

    def close(self) -> None:
        super().close()
        if self._parquet is not None:
            self._parquet.close(force=True)
            self._parquet = None


def _raise_if_disk(error: Exception) -> None:
    """Arrow reports damaged files as plain `OSError` without a number; anything else is a disk or a network failing."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


class _RowGroups:
    """The row groups that this process read last, up to `ROW_GROUP_CACHE` bytes. One row cannot be read alone."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Any, pa.Table] = OrderedDict()

    def get(self, key: Any, read: Callable[[], pa.Table]) -> pa.Table:
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self._tables[key] = read()
        while len(self._tables) > 1 and sum(kept.nbytes for kept in self._tables.values()) > ROW_GROUP_CACHE:
            self._tables.popitem(last=False)
        return table


_row_groups = _RowGroups()
