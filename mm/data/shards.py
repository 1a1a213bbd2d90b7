"""Shards read where they lie: WebDataset tars, parquet files and JSON lines.

    scan()  one sequential pass:  Scanned(key, place, record | error), …      what the index is made of
    read(place)  random access:   Record(key, fields)                         what training reads

A place is (byte offset, size) of a sample's members in a tar (`mm.data.tar`) or of its line (`mm.data.jsonl`),
(row group, row in it) in a parquet file (`mm.data.parquet`). Nothing is ever extracted: the names in a tar are labels.
A damaged shard gives an error with its reason for what is lost and goes on where it can; a disk or a network that fails
raises, since it must never change which samples there are. Their bytes are read by `mm.data.files`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mm.data.files import (
    HEAD,
    LocalFile,
    ShardChanged,
    ShardError,
    ShardFile,
    ShardFingerprint,
    ShardStat,
    check_unchanged,
    is_remote,
    open_file,
    refuse_unreadable,
)

__all__ = [
    "FORMATS",
    "MAX_RECORD",
    "LocalFile",
    "Place",
    "Record",
    "Scanned",
    "Shard",
    "ShardChanged",
    "ShardError",
    "ShardFile",
    "ShardFingerprint",
    "ShardStat",
    "is_remote",
    "open_file",
    "open_shard",
    "refuse_unreadable",
]

Place = tuple[int, int]

FORMATS = ("webdataset", "parquet", "jsonl")
MAX_RECORD = 1024**3
"""Most bytes of a record of a tar: all its members together."""
EMPTY = "empty shard: the file has 0 bytes"


@dataclass(frozen=True, slots=True)
class Record:
    """A sample as stored. Fields are bytes by extension (tar) or values by column (parquet)."""

    key: str
    fields: dict[str, Any]


class Scanned(NamedTuple):
    """One step of a scan: a record, or the reason why there is none. Errors of a whole shard have an empty key."""

    key: str
    place: Place
    record: Record | None
    error: str | None = None


class Shard(ABC):
    """A shard of records.

    Args:
        file: its bytes.
        expected: size and version when it was indexed; reading anything else raises `ShardChanged`.

    Attributes:
        hidden: number of hidden files that the last scan skipped, see `mm.data.hidden`.
    """

    def __init__(self, file: ShardFile, expected: ShardStat | None = None) -> None:
        self.file = file
        self.hidden = 0
        self.expected = expected
        if expected is not None and is_remote(file.path):
            self.check()  # once: a request a sample would double their number

    @property
    def path(self) -> str:
        return self.file.path

    def scan(self) -> Iterator[Scanned]:
        """All records in order, in one sequential pass, with an error for whatever cannot be read.

        Raises:
            ShardError: it is no file, or a compressed one, or stands for one that was not downloaded.
            OSError: the disk or the network failed, which says nothing about the data.
        """
        if self.file.stat().size == 0:
            yield Scanned("", (0, 0), None, EMPTY)
            return
        yield from self._scan()

    def refuse_head(self) -> None:
        """Raises `ShardError` where the first bytes tell that it is no shard, see `refuse_unreadable`."""
        refuse_unreadable(self.path, self.file.read(0, HEAD))

    @abstractmethod
    def _scan(self) -> Iterator[Scanned]: ...

    @abstractmethod
    def _record(self, place: Place) -> Record: ...

    def read(self, place: Place) -> Record:
        """The record at a place that `scan` gave.

        Raises:
            ShardChanged: the shard is not the one that was scanned.
            OSError: the disk or the network failed.
        """
        if not is_remote(self.path):
            self.check()
        return self._record(place)

    def close(self) -> None:
        self.file.close()

    def check(self) -> None:
        """Raises `ShardChanged` where the shard is not the expected one by size and version."""
        if self.expected is not None:
            check_unchanged(self.file, self.expected)


def open_shard(
    path: str,
    format: str,
    columns: Collection[str] = (),
    expected: ShardStat | None = None,
    file: ShardFile | None = None,
) -> Shard:
    """A shard for reading.

    Args:
        path: local path or fsspec URL.
        format: one of `FORMATS`.
        columns: columns of a parquet file to read; others are not even decoded. Empty: all.
        expected: see `Shard`.
        file: its bytes where they are not read at `path`, such as a cached copy.
    """
    file = open_file(path) if file is None else file
    from mm.data import jsonl, parquet, tar  # which are built on this module

    if format == "parquet":
        return parquet.ParquetShard(file, expected, columns)
    if format == "jsonl":
        return jsonl.JsonlShard(file, expected)
    return tar.TarShard(file, expected)
