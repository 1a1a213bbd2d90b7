"""Parquet files as Hugging Face hosts them: a row is a record, its columns are the fields.

    row group ──batches of rows──▶ Record(row number, {column: value})

A row cannot be read without its row group: the last ones stay in memory, or see `mm.data.rows`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.files import ShardChanged, ShardFile, ShardStat
from mm.data.pages import DamagedPages, RowGroup
from mm.data.row_groups import ChunkStream, RowGroupPlan, chunk_numbers, plan_row_group
from mm.data.shards import Place, Record, Scanned, Shard
from mm.data.values import BadRow, row_of, rows_of

ROW_GROUP_CACHE = 256 * 1024**2
"""Bytes of decoded row groups that a process keeps. The last one read is kept whatever its size."""

EMPTY = "empty parquet file: no row in it"


class DamagedRows(ValueError):
    """Rows of a row group that cannot be decoded; the message says why."""


class ParquetShard(Shard):
    """A parquet file as Hugging Face hosts it: one row a record, fields are columns, the key is the row's number."""

    def __init__(self, file: ShardFile, expected: ShardStat | None = None, columns: Collection[str] = ()) -> None:
        super().__init__(file, expected)
        self.columns = frozenset(columns)
        self._parquet: pq.ParquetFile | None = None
        self._chunks: ChunkStream | None = None

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first row of every row group, and behind them that of all rows."""
        return list(itertools.accumulate(self.row_groups(), initial=0))

    def row_groups(self) -> list[int]:
        """Number of rows of every row group."""
        return [group.rows for group in self.footer]

    @cached_property
    def footer(self) -> list[RowGroup]:
        """The row groups.

        Raises:
            pa.ArrowException, OSError, ValueError: it is no parquet file, or a damaged one.
        """
        file = self._open()
        assert self._chunks is not None
        return self._chunks.footer(columns=len(file.schema))

    @property
    def chunk_numbers(self) -> list[int]:
        """Numbers of the column chunks of a row group that are read."""
        return chunk_numbers(self._open(), self.schema.names)

    @property
    def schema(self) -> pa.Schema:
        """The columns that are read, in the order of the file."""
        schema = self._open().schema_arrow
        return pa.schema([field for field in schema if not self.columns or field.name in self.columns])

    def _scan(self) -> Iterator[Scanned]:
        try:
            groups, names = len(self.starts) - 1, self.schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError, DamagedPages) as error:
            _raise_if_no_damage(error)
            self.refuse_head()
            yield Scanned("", (0, 0), None, f"not a readable parquet file: {error}")
            return
        if not names:
            have = ", ".join(self._open().schema_arrow.names[:20])
            yield Scanned("", (0, 0), None, f"missing columns: {', '.join(sorted(self.columns))}; the file has {have}")
            return
        if not self.starts[-1]:
            yield Scanned("", (0, 0), None, EMPTY)
        for group in range(groups):
            if self.starts[group] < self.starts[group + 1]:
                yield from self._scan_group(group)

    def _scan_group(self, group: int) -> Iterator[Scanned]:
        first, row = self.starts[group], 0
        try:
            for batch in self.batches(group):
                for fields in rows_of(batch):
                    key = str(first + row)
                    if isinstance(fields, BadRow):
                        yield Scanned(key, (group, row), None, f"{fields}, in row {key}")
                    else:
                        yield Scanned(key, (group, row), Record(key, fields))
                    row += 1
        except DamagedRows as damage:
            lost = self.starts[group + 1] - first - row
            reason = f"damaged parquet file: {lost} rows of row group {group} are lost: {damage}"
            yield Scanned(str(first + row), (group, row), None, reason)

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, at most `BATCH` at a time, and fewer if they are large.

        Raises:
            DamagedRows: some cannot be decoded, or would take too much memory; those before them were given.
            OSError: the disk or the network failed.
        """
        yield from self.planned_batches(group)[1]

    def planned_batches(self, group: int) -> tuple[RowGroupPlan, Iterator[pa.RecordBatch]]:
        """How a row group is decoded, and its `batches`, all but the last of as many rows as the plan says.

        Raises:
            DamagedRows: nothing of it can be decoded.
        """
        file = self._open()
        assert self._chunks is not None
        try:
            plan = plan_row_group(file, self._chunks, self.footer[group], self.schema.names)
        except (pa.ArrowException, OSError, DamagedPages) as error:
            self._chunks.forget()
            _raise_if_no_damage(error)
            raise DamagedRows(str(error)) from error
        return plan, self._decode(file, plan, group)

    def _decode(self, file: pq.ParquetFile, plan: RowGroupPlan, group: int) -> Iterator[pa.RecordBatch]:
        names = self.schema.names
        try:
            if plan.dictionaries:
                coded = list(plan.dictionaries)
                file = pq.ParquetFile(self._chunks, metadata=file.metadata, read_dictionary=coded, pre_buffer=False)
            yield from file.iter_batches(plan.rows, row_groups=[group], columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            _raise_if_no_damage(error)
            raise DamagedRows(str(error)) from error
        finally:
            if self._chunks is not None:
                self._chunks.forget()

    def _record(self, place: Place) -> Record:
        group, row = place
        if group >= len(self.starts) - 1:
            raise ShardChanged(f"{self.path}: no row group {group} in {len(self.starts) - 1}")
        table = _row_groups.get((self.path, self.expected, group, self.columns), lambda: self._read_group(group))
        batches = self.batches(group) if table is None else table.slice(row, 1).to_batches()
        seen = 0 if table is None else row
        for batch in batches:
            if row < seen + batch.num_rows:
                return self._record_of(batch, row - seen, self.starts, place)
            seen += batch.num_rows
        there = seen if table is None else table.num_rows
        raise ShardChanged(f"{self.path}: no row {row} in row group {group}, which has {there}")

    def _record_of(self, batch: pa.RecordBatch, row: int, starts: Sequence[int], place: Place) -> Record:
        """The record in a row of a batch, which is at a place of the shard; `starts` as of the shard."""
        try:
            return Record(str(starts[place[0]] + place[1]), row_of(batch, row))
        except BadRow as bad:
            raise ShardChanged(f"{self.path}: no record in row {place[1]} of row group {place[0]}: {bad}") from bad

    def _read_group(self, group: int) -> pa.Table | None:
        """A row group as far as it can be decoded; None if it is too large to be kept."""
        kept: list[pa.RecordBatch] = []
        size = 0
        with suppress(DamagedRows):
            plan, batches = self.planned_batches(group)
            for batch in batches:
                kept.append(batch)
                size += batch.nbytes
                if size > max(ROW_GROUP_CACHE, plan.granted):
                    return None
        return pa.Table.from_batches(kept, None if kept else self.schema)

    def _open(self) -> pq.ParquetFile:
        if self._parquet is None:
            self._chunks = ChunkStream(self.file.stream())
            self._parquet = pq.ParquetFile(self._chunks, pre_buffer=False)
        return self._parquet

    def close(self) -> None:
        super().close()
        if self._parquet is not None:
            self._parquet.close(force=True)
        self._parquet = self._chunks = None


def _raise_if_no_damage(error: Exception) -> None:
    """Arrow reports damaged files as plain `OSError` without a number; anything else is a disk or a network failing.

    Memory that is short says nothing about the data either: what a row group may take was checked before.
    """
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


class _RowGroups:
    """The row groups that this process read last, up to `ROW_GROUP_CACHE` bytes. One row cannot be read alone."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Any, pa.Table | None] = OrderedDict()

    def get(self, key: Any, read: Callable[[], pa.Table | None]) -> pa.Table | None:
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self._tables[key] = read()
        while len(self._tables) > 1 and sum(kept.nbytes for kept in self._tables.values() if kept) > ROW_GROUP_CACHE:
            self._tables.popitem(last=False)
        return table


_row_groups = _RowGroups()
