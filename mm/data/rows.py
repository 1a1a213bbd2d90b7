"""Rows of parquet files, kept so that one can be read without its row group.

    parquet ──once──▶ uncompressed Arrow batches of 64 rows in the shard cache ──memory map──▶ a row costs its pages

In a parquet file a row cannot be read alone: shuffled reads would decode, and of a remote file transfer, a whole row
group for every sample. Where a card has a cache, the first read of a shard lays its rows out on disk, those of the
columns that the card reads, and all processes and runs read them from there. What has no room is read in place.
"""

from __future__ import annotations

import io
import itertools
import json
import mmap
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from mm import terminal
from mm.data.cache import Content, Hold, NotKept, ShardCache, entry_name
from mm.data.files import PinnedFile, ShardStat, check_unchanged, is_remote, open_file
from mm.data.pages import DamagedPages
from mm.data.parquet import DamagedRows, ParquetShard
from mm.data.row_groups import BATCH, MOST_RATIO
from mm.data.shards import Place, Record
from mm.data.values import AT_ONCE, value_bytes

logger = terminal.logger(__name__)

VERSION = 2
"""Raised when the files change their form, so that they are made anew."""

_GROUPS = b"mm.row_groups"
_DAMAGE = b"mm.damage"
_LAYOUT = b"mm.layout"


@dataclass(frozen=True)
class ParquetRows(Content):
    """The rows of a parquet file, of some columns, as an Arrow IPC file.

    All batches of a row group but the last have as many rows, so that a place tells the batch. Where rows cannot be
    decoded, an empty batch says why. Behind all of them, an empty batch says how the row groups are laid out.
    """

    path: str
    stat: ShardStat
    columns: frozenset[str]

    @property
    def name(self) -> str:
        identity = [self.path, *self.stat, "rows", VERSION, BATCH, *sorted(self.columns)]
        return entry_name(f"{self.path}.rows", identity, size=0)

    def check(self) -> None:
        check_unchanged(open_file(self.path), self.stat)

    def fill(self, part: Path, reserve: Callable[[int], None]) -> None:
        shard = ParquetShard(open_file(self.path), None, self.columns)
        try:
            reserve(_decoded_bytes(shard))
            with _Growing(part, reserve) as raw, io.BufferedWriter(raw, 1024**2) as file:
                _write(shard, file)
                file.flush()
                raw.truncate()
                os.fsync(raw.fileno())
        except (pa.ArrowException, DamagedPages) as error:
            raise NotKept("rows", f"its rows cannot be kept: {error}") from error
        finally:
            shard.close()


class RowShard(ParquetShard):
    """A parquet file whose rows are read from where a cache keeps them; in place where it does not.

    A scan reads every row group once: of a local file in place, of a remote one from the cache, to transfer it once.
    """

    def __init__(self, cache: ShardCache, path: str, expected: ShardStat, columns: Collection[str]) -> None:
        super().__init__(PinnedFile(path, expected) if is_remote(path) else open_file(path), expected, columns)
        self._rows = Hold(cache, ParquetRows(path, expected, self.columns), _Rows)

    def row_groups(self) -> list[int]:
        rows = self._kept() if is_remote(self.path) else None
        return super().row_groups() if rows is None else rows.groups

    @property
    def schema(self) -> pa.Schema:
        rows = self._kept() if is_remote(self.path) else None
        return super().schema if rows is None else rows.schema

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        rows = self._kept() if is_remote(self.path) else None
        return super().batches(group) if rows is None else rows.batches(group)

    def _record(self, place: Place) -> Record:
        rows = self._kept()
        found = None if rows is None else rows.row(place)
        if rows is None or found is None:
            return super()._record(place)
        return self._record_of(*found, rows.starts, place)

    def _kept(self) -> _Rows | None:
        with self._rows as rows:
            if rows is None or rows.are_whole():
                return rows
            logger.warning("%s: its rows were cut while they were read; reading it in place", self.path)
            self._rows.give_up()
            return None

    def close(self) -> None:
        super().close()
        self._rows.close()


class _Rows:
    """Kept rows, open for reading.

    groups: number of rows of every row group
    starts: number of the first row of each, see `ParquetShard.starts`
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._file = pa.ipc.open_file(pa.py_buffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)))
        self.schema: pa.Schema = self._file.schema
        self.groups: list[int] = json.loads(self._file.schema.metadata[_GROUPS])
        self.starts = list(itertools.accumulate(self.groups, initial=0))
        _, last = self._file.get_batch_with_custom_metadata(self._file.num_record_batches - 1)
        layout: list[tuple[int, int]] = json.loads(last[_LAYOUT])
        self._rows = [rows for rows, _ in layout]
        self._batches = list(itertools.accumulate((batches for _, batches in layout), initial=0))

    def are_whole(self) -> bool:
        """Whether the file is as long as it was: touching mapped pages behind its end would kill the process."""
        return os.fstat(self._descriptor).st_size == self._size

    def row(self, place: Place) -> tuple[pa.RecordBatch, int] | None:
        """The batch with the row at a place and its number in it, None where there is none, or it was not decoded."""
        group, row = place
        if group >= len(self.groups):
            return None
        number = self._batches[group] + row // self._rows[group]
        if number >= self._batches[group + 1]:
            return None
        batch = self._file.get_batch(number)
        within = row % self._rows[group]
        return (batch, within) if within < batch.num_rows else None

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """As `ParquetShard.batches`."""
        for number in range(self._batches[group], self._batches[group + 1]):
            batch, metadata = self._file.get_batch_with_custom_metadata(number)
            if metadata is not None and _DAMAGE in metadata:
                raise DamagedRows(metadata[_DAMAGE].decode())
            yield batch


def _write(shard: ParquetShard, file: IO[bytes]) -> None:
    """Writes all rows of a shard that can be decoded."""
    groups = shard.row_groups()
    schema = pa.schema([_plain(field) for field in shard.schema], {_GROUPS: json.dumps(groups)})
    empty = pa.RecordBatch.from_arrays([pa.array([], type) for type in schema.types], schema=schema)
    layout: list[tuple[int, int]] = []
    with pa.ipc.new_file(file, schema) as writer:
        for group in range(len(groups)):
            rows, written = BATCH, 0
            try:
                plan, batches = shard.planned_batches(group)
                rows, before = plan.rows, plan.rows
                for batch in batches:
                    if before != rows or batch.num_rows > rows:
                        raise NotKept("rows", f"row group {group} is decoded in batches of {batch.num_rows} rows")
                    writer.write_batch(_written_out(batch, schema, group))
                    written, before = written + 1, batch.num_rows
            except DamagedRows as damage:
                writer.write_batch(empty, custom_metadata={_DAMAGE: str(damage)})
                written += 1
            layout.append((rows, written))
        writer.write_batch(empty, custom_metadata={_LAYOUT: json.dumps(layout)})


def _written_out(batch: pa.RecordBatch, schema: pa.Schema, group: int) -> pa.RecordBatch:
    """A batch without dictionaries."""
    columns = batch.columns
    if [column.type for column in columns] != schema.types:
        if value_bytes(batch) > AT_ONCE:
            raise NotKept("rows", f"rows of row group {group} take {value_bytes(batch)} bytes")
        columns = [column.cast(type) for column, type in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _plain(field: pa.Field) -> pa.Field:
    """A field without a dictionary: every row group has its own, an Arrow file but one."""
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _decoded_bytes(shard: ParquetShard) -> int:
    """About what the rows of a shard take on disk: what its footer says of the columns without their compression."""
    said = sum(group.chunks[number].uncompressed for group in shard.footer for number in shard.chunk_numbers)
    return min(said, MOST_RATIO * shard.file.stat().size)  # a footer may say anything


class _Growing(io.FileIO):
    """A file whose size nobody knows before it is written. Room is made in steps, each of which costs a look around."""

    STEP = 64 * 1024  # bytes, and of large files a thirty-second

    def __init__(self, path: Path, reserve: Callable[[int], None]) -> None:
        super().__init__(path, "r+")
        self._reserve = reserve
        self._reserved = path.stat().st_size

    def write(self, data: Any) -> int:
        end = self.tell() + memoryview(data).nbytes
        if end > self._reserved:
            self._reserved = end + max(self.STEP, end // 32)
            self._reserve(self._reserved)
        return super().write(data)
