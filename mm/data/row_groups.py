"""The cost of a parquet row group, found before it is decoded.

    column chunks ──read once──▶ page headers ──▶ RowGroupPlan(rows a batch, …)   or a refusal
                        └─ the same bytes ─────▶ Arrow

Neither the footer nor a dictionary bounds what comes out: 58 KB of compressed zeros may be 2 GB, and one entry of a
dictionary may be the value of a million rows. Memory is granted in proportion to the bytes that are in the file.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow.parquet as pq

from mm.data.pages import DamagedPages, Page, RowGroup, read_footer, read_pages

BATCH = 64
"""Most rows of a row group that are decoded at a time. A damaged place costs those of its batch and all after it."""
BATCH_BYTES = 64 * 1024**2
"""Bytes that a batch, or the pages that it needs, may take however small they are in the file."""
MOST_RATIO = 32
"""Bytes that a row group may take for each that it has in the file."""
FREE_ROWS = 2**20
"""Rows that a file may have however small it is. More need a byte for `MOST_RATIO` of them."""
MAX_VALUES = 2**25
"""Most values in a column of lists of a row group: any row may hold them all."""


@dataclass(frozen=True)
class RowGroupPlan:
    """How to decode a row group.

    rows: of a batch
    dictionaries: paths of the columns that are kept as numbers into a dictionary
    stored: bytes in the file
    """

    rows: int
    dictionaries: tuple[str, ...]
    stored: int

    @property
    def granted(self) -> int:
        """Bytes that may be held of it."""
        return max(BATCH_BYTES, MOST_RATIO * self.stored)


class ChunkStream(io.RawIOBase):
    """A stream that gives its end, and the column chunks that were read from it, a second time from memory."""

    TAIL = 64 * 1024  # bytes in which Arrow looks for a footer

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept: dict[int, bytes] = {}
        self._position = 0
        self.size = stream.seek(0, io.SEEK_END)
        self._tail_start = stream.seek(max(0, self.size - self.TAIL))
        self._tail = stream.read(self.TAIL)

    def keep(self, start: int, size: int) -> bytes:
        """Bytes of a column chunk, kept until `forget`.

        Raises:
            DamagedPages: it ends behind the file.
        """
        if not 0 <= start <= start + size <= self.size:
            raise DamagedPages(f"a column chunk at bytes {start}:{start + size} of a file of {self.size}")
        self._stream.seek(start)
        self._kept[start] = self._stream.read(size)
        return self._kept[start]

    def footer(self, columns: int) -> list[RowGroup]:
        """The row groups of the file, which Arrow has opened.

        Args:
            columns: chunks that each of them has.

        Raises:
            DamagedPages: it cannot be read, or has more rows than a file of this size can hold in earnest.
        """
        self.seek(self.size - 8)
        length = int.from_bytes(self.read(4), "little")
        self.seek(self.size - 8 - length)
        groups = read_footer(self.read(length))
        if odd := next((group for group in groups if len(group.chunks) != columns), None):
            raise DamagedPages(f"a row group with {len(odd.chunks)} column chunks for {columns} columns")
        rows, most = sum(group.rows for group in groups), max(FREE_ROWS, MOST_RATIO * self.size)
        if rows > most:
            raise DamagedPages(f"too many rows: {rows} in {self.size} bytes, the limit is {most}")
        return groups

    def forget(self) -> None:
        self._kept = {}

    def read(self, size: int = -1, /) -> bytes:
        kept = self._kept.get(self._position)
        if kept is not None and 0 <= size <= len(kept):
            data = kept[:size]  # all of it, without a copy
        elif self._position >= self._tail_start and size >= 0:
            start = self._position - self._tail_start
            data = self._tail[start : start + size]
        else:
            self._stream.seek(self._position)
            data = self._stream.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._kept = {}
        self._stream.close()
        super().close()


def chunk_numbers(file: pq.ParquetFile, names: Collection[str]) -> list[int]:
    """Numbers of the chunks of a row group that belong to some columns of a file: of a nested one there are several."""
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    return [
        number
        for number, path in enumerate(paths)
        if any(path == name or path.startswith(f"{name}.") for name in names)
    ]


def plan_row_group(file: pq.ParquetFile, chunks: ChunkStream, group: RowGroup, names: Collection[str]) -> RowGroupPlan:
    """How to decode some columns of a row group, whose chunks are kept in `chunks`.

    Raises:
        DamagedPages: its pages are not what the footer says, or they would take more memory than is granted.
    """
    columns, stored = [], 0
    for number in chunk_numbers(file, names):
        chunk = group.chunks[number]
        stored += chunk.size
        columns.append(_Column(file.schema.column(number), tuple(read_pages(chunks.keep(chunk.start, chunk.size)))))
        columns[-1].check(group.rows)
    plan = RowGroupPlan(
        rows=_batch_rows(columns, group.rows),
        dictionaries=tuple(column.path for column in columns if column.must_stay_coded),
        stored=min(stored, chunks.size),
    )
    held = sum(column.held for column in columns)
    if held > plan.granted:
        raise DamagedPages(
            f"too large: {held} bytes of pages from {plan.stored} in the file, the limit is {plan.granted}"
        )
    return plan


class _Column:
    """A column of a row group by its pages."""

    def __init__(self, described: pq.ColumnSchema, pages: Sequence[Page]) -> None:
        self.path: str = described.path
        self.is_list = described.max_repetition_level > 0
        self.is_binary = described.physical_type == "BYTE_ARRAY"
        self.width: int = max(described.length, 0) if described.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8
        self.sizes = np.array([page.size for page in pages if not page.is_dictionary], np.int64)
        self.values = np.array([page.values for page in pages if not page.is_dictionary], np.int64)
        self.dictionary = sum(page.size for page in pages if page.is_dictionary)
        self.coded = sum(page.values for page in pages if page.coded)

    def check(self, rows: int) -> None:
        values = int(self.values.sum())
        if self.is_list and values > MAX_VALUES:
            raise DamagedPages(f"too large: {values} values in the lists of column {self.path!r}, at most {MAX_VALUES}")
        if not self.is_list and values != rows:
            raise DamagedPages(f"column {self.path!r} has {values} values, the footer says {rows} rows")

    @property
    def must_stay_coded(self) -> bool:
        """Whether one row could hold so many large entries of the dictionary that they must not be written out."""
        return self.is_list and self.is_binary and self.coded * self.dictionary > BATCH_BYTES

    @property
    def largest(self) -> int:
        return int(self.sizes.max(initial=0))

    @property
    def held(self) -> int:
        """Bytes that decoding one row takes: a page, and of lists all pages, since a row may go through them all."""
        if not self.is_list:
            return self.largest + self.dictionary + self.width
        written_out = 0 if self.is_binary or self.width <= 8 else int(self.values.sum()) * self.width
        return int(self.sizes.sum()) + self.dictionary + written_out

    def batch_bytes(self, rows: int, all_rows: int) -> int:
        """Bytes of the values of the largest batch of so many rows, at most; of lists the mean."""
        if self.is_list:
            return int(self.sizes.sum()) * rows // max(all_rows, 1)
        starts = np.concatenate([[0], np.cumsum(self.values)])
        before = np.concatenate([[0], np.cumsum(self.sizes)])
        first = np.arange(0, all_rows, rows)
        last = np.minimum(first + rows, all_rows) - 1
        low = np.searchsorted(starts, first, side="right") - 1
        high = np.searchsorted(starts, last, side="right")
        entry = max(self.dictionary if self.coded else 0, self.width)
        return int((before[high] - before[low]).max(initial=0)) + rows * entry


def _batch_rows(columns: Sequence[_Column], all_rows: int) -> int:
    """Rows of a batch, a power of two: the most whose bytes are within `BATCH_BYTES`, or two pages of each column."""
    rows, limit = BATCH, max(BATCH_BYTES, 2 * sum(column.largest for column in columns))
    while rows > 1 and sum(column.batch_bytes(rows, all_rows) for column in columns) > limit:
        rows //= 2
    return rows
