"""Shards read where they lie: WebDataset tars and parquet files, on disk or behind any fsspec URL.

    scan()  one sequential pass:  Scanned(key, place, record | error), …      what the index is made of
    read(place)  random access:   Record(key, fields)                         what training reads

A place is (byte offset, size) of a sample's members in a tar, (row group, row in it) in a parquet file; of JSON lines,
see `mm.data.jsonl`. Nothing is ever extracted: the names in a tar are labels. A damaged shard gives an error with its
reason for what is lost and goes on where it can; a disk or a network that fails raises, since it must never change
which samples there are.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shlex
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mm import terminal

logger = terminal.logger(__name__)

T = TypeVar("T")
Place = tuple[int, int]

FORMATS = ("webdataset", "parquet", "jsonl")
BLOCK = 512
MAX_MEMBER = 1024**3
"""Largest member of a tar that is read into memory, in bytes."""
NO_END = "no end marker: the shard may have been cut off between two members"
PAUSES = (0.5, 2.0)
"""Seconds to wait before a request that failed is tried again."""
ROW_GROUP_CACHE = 256 * 1024**2
"""Bytes of decoded row groups that a process keeps. The last one read is kept whatever its size."""
BATCH = 64
"""Rows of a row group that are decoded at a time. A damaged place costs those of its batch and all after it."""


COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gunzip"),
    ".tgz": (b"\x1f\x8b", "gunzip"),
    ".bz2": (b"BZh", "bunzip2"),
    ".xz": (b"\xfd7zXZ", "unxz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
}
"""First bytes of compressed files, and the command that undoes it."""


class ShardError(ValueError):
    """A shard that cannot be read as what its card says it is."""


class RequestFailed(OSError):
    """A server or a network that failed. Of its own type, since it must never be taken for a damaged file."""


class DamagedRows(ValueError):
    """Rows of a row group that cannot be decoded; the message says why."""


class ShardChanged(RuntimeError):
    """A shard that is not the one that was indexed: places and columns would silently mean other samples."""


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


class ShardStat(NamedTuple):
    """What tells cheaply that a shard has not changed: size in bytes, and mtime in ns (disk), ETag or date (URL).

    A date is only ever compared with itself, never with another clock, so that a server's may be wrong.
    """

    size: int
    version: str


class ShardFingerprint(NamedTuple):
    """Size in bytes and checksum of the content; of a URL, which is not downloaded for it, of size and version."""

    size: int
    checksum: str


class ShardFile(ABC):
    """Bytes of a shard, local or remote."""

    path: str

    @abstractmethod
    def stat(self) -> ShardStat:
        """Size and version as they are now."""

    @abstractmethod
    def fingerprint(self) -> ShardFingerprint: ...

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end."""

    @abstractmethod
    def stream(self) -> IO[bytes]:
        """A seekable file for sequential reading."""

    @abstractmethod
    def close(self) -> None:
        """Frees what `read` keeps open."""


class LocalFile(ShardFile):
    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def stat(self) -> ShardStat:
        found = os.stat(self.path)  # noqa: PTH116  once a sample: pathlib takes three times as long
        return ShardStat(found.st_size, str(found.st_mtime_ns))

    def fingerprint(self) -> ShardFingerprint:
        with Path(self.path).open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return ShardFingerprint(file.tell(), digest.hexdigest())

    def read(self, offset: int, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return os.pread(self._descriptor, size, offset)

    def stream(self) -> IO[bytes]:
        return Path(self.path).open("rb", buffering=1024**2)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class RemoteFile(ShardFile):
    """A shard behind an fsspec URL, read by ranges; every request is tried three times."""

    _VERSIONS = (
        *("ETag", "etag", "Content-MD5", "md5Hash"),
        *("Last-Modified", "LastModified", "last_modified", "mtime", "created"),
    )

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = fsspec.url_to_fs(path)

    def stat(self) -> ShardStat:
        info = _retried(self.path, lambda: self._system.info(self._inner))
        if info.get("size") is None:
            raise ShardError(f"{self.path}: the server gives no size; download the shard, or use a server with ranges")
        return ShardStat(info["size"], next((str(info[key]) for key in self._VERSIONS if info.get(key)), ""))

    def fingerprint(self) -> ShardFingerprint:
        stat = self.stat()
        digest = hashlib.blake2b(f"{stat.size} {stat.version}".encode(), digest_size=16)
        return ShardFingerprint(stat.size, digest.hexdigest())

    def read(self, offset: int, size: int) -> bytes:
        return _retried(self.path, lambda: self._range(offset, size))

    def read_exactly(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer, of a shard that is known to be longer, are a failed request."""
        return _retried(self.path, lambda: self._whole_range(offset, size))

    def _range(self, offset: int, size: int) -> bytes:
        data = self._system.cat_file(self._inner, start=offset, end=offset + size)
        if len(data) > size:
            # A server without ranges answers with the whole file, whose beginning would pass for the sample.
            raise ShardError(f"{self.path}: the server ignores ranges; download the shard, or use another server")
        return data

    def _whole_range(self, offset: int, size: int) -> bytes:
        data = self._range(offset, size)
        if len(data) != size:
            raise RequestFailed(f"{self.path}: the server gave {len(data)} of {size} bytes at {offset}")
        return data

    def stream(self) -> IO[bytes]:
        return buffered_stream(self, self.stat().size)

    def close(self) -> None:
        """Requests keep nothing open."""


class PinnedFile(RemoteFile):
    """A remote shard of known size and version. The server is not asked before it is read from."""

    def __init__(self, path: str, stat: ShardStat) -> None:
        super().__init__(path)
        self._stat = stat
        self._read = False

    def stat(self) -> ShardStat:
        return super().stat() if self._read else self._stat

    def read(self, offset: int, size: int) -> bytes:
        if not self._read:
            self._read = True
            check_unchanged(self, self._stat)
        return super().read(offset, size)


def buffered_stream(file: ShardFile, size: int) -> IO[bytes]:
    """A seekable file of `size` bytes over `file.read`, so that a long scan survives a failed request."""
    return io.BufferedReader(_Ranges(file, size), 4 * 1024**2)


class _Ranges(io.RawIOBase):
    def __init__(self, file: ShardFile, size: int) -> None:
        self._file, self._size, self._position = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._file.read(self._position, wanted)
        if len(data) != wanted:  # taken for the end of the shard, it would cost the samples that follow
            given = f"the server gave {len(data)} of {wanted} bytes at {self._position}"
            raise RequestFailed(f"{self._file.path}: {given}")
        buffer[:wanted] = data
        self._position += len(data)
        return len(data)


def _retried(path: str, request: Callable[[], T]) -> T:
    """The answer to a request, which is tried three times unless the file is not there or not allowed."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except (OSError, aiohttp.ClientError) as error:
            cause = _true_cause(error)
            if isinstance(cause, FileNotFoundError | PermissionError):
                raise
            if pause is None:
                raise RequestFailed(f"{path}: request failed three times: {cause!r}") from error
            logger.warning("%s: request failed, next try in %s s: %r", path, pause, cause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _true_cause(error: Exception) -> BaseException:
    """What went wrong: fsspec calls whatever befalls a HEAD request `FileNotFoundError`."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) not in (404, 410):
        return cause
    return error


def refuse_compressed(path: str, head: bytes = b"") -> None:
    """Raises `ShardError` for a shard that is compressed by its name or its first bytes: nothing in it has a place."""
    for suffix, (magic, command) in COMPRESSED.items():
        if path.endswith(suffix) or head.startswith(magic):
            raise ShardError(
                f"{path} is compressed, so that a sample in it cannot be read without all before it. Convert "
                f"it once: {command} {shlex.quote(path)}"
            )


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL (``s3://…``, ``simplecache::https://…``) and not a local file."""
    return "://" in path and not path.startswith("file://")


class Shard(ABC):
    """A shard of records.

    Args:
        file: its bytes.
        expected: size and version when it was indexed; reading anything else raises `ShardChanged`.
    """

    def __init__(self, file: ShardFile, expected: ShardStat | None = None) -> None:
        self.file = file
        self.expected = expected
        if expected is not None and is_remote(file.path):
            self.check()  # once: a request a sample would double their number

    @property
    def path(self) -> str:
        return self.file.path

    @abstractmethod
    def scan(self) -> Iterator[Scanned]:
        """All records in order, in one sequential pass, with an error for whatever cannot be read.

        Raises:
            OSError: the disk or the network failed, which says nothing about the data.
        """

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


def check_unchanged(file: ShardFile, expected: ShardStat) -> None:
    """Raises `ShardChanged` where the file is not the expected one by size and version."""
    found = file.stat()
    if found != expected:
        raise ShardChanged(
            f"{file.path}: was {expected} when it was indexed, is {found}; shards must not change under a run. "
            "Restore it, or index again and start a new stage"
        )


def open_file(path: str) -> ShardFile:
    """The bytes of a shard where they lie."""
    return RemoteFile(path) if is_remote(path) else LocalFile(path.removeprefix("file://"))


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
    if format == "parquet":
        return ParquetShard(file, expected, columns)
    if format == "jsonl":
        from mm.data.jsonl import JsonlShard  # which is built on this module

        return JsonlShard(file, expected)
    return TarShard(file, expected)


# ---------------------------------------------------------------------------------------------------------------- tar


class Member(NamedTuple):
    """A regular file of a tar: bytes ``start:end`` of the archive with its headers and padding.

    `problem` says why there is no data. `fatal`: something may be missing around it, so the sample that it belongs to
    is not to be trusted.
    """

    name: str
    start: int
    end: int
    data: bytes = b""
    problem: str | None = None
    fatal: bool = False


class TarShard(Shard):
    """WebDataset: consecutive members with equal names up to the first dot of the base name are one record."""

    def scan(self) -> Iterator[Scanned]:
        size = self.file.stat().size
        refuse_compressed(self.path, self.file.read(0, 8))
        group: _Group | None = None
        cut = False
        with self.file.stream() as stream:
            for member in walk_tar(stream, size):
                cut |= member.fatal
                if member.problem and not member.fatal:
                    yield Scanned(member.name, (member.start, member.end - member.start), None, member.problem)
                    continue
                label = split_name(member.name)
                if label is None and not member.fatal:
                    yield Scanned(member.name, (member.start, member.end - member.start), None, _NO_EXTENSION)
                    continue
                key, field = label or ("", "")
                if group is not None and key and key != group.key:
                    yield group.finish()
                    group = None
                if group is None:
                    group = _Group(key, member.start)
                group.add(field, member)
        if group is not None:
            yield group.finish()
        if not cut and self.file.read(max(0, size - BLOCK), BLOCK) != _ZEROS:
            yield Scanned("", (size, 0), None, NO_END)

    def _record(self, place: Place) -> Record:
        offset, size = place
        data = self.file.read(offset, size)
        key, fields = "", {}
        for member in walk_tar(io.BytesIO(data), len(data)):
            label = split_name(member.name)
            if member.fatal:
                raise ShardChanged(f"{self.path}: no sample at bytes {offset}:{offset + size}: {member.problem}")
            if label and not member.problem:
                key, field = label
                fields[field] = member.data
        if not fields:
            raise ShardChanged(f"{self.path}: no sample at bytes {offset}:{offset + size}")
        return Record(key, fields)


class _Group:
    """The members of one record, as they come by."""

    def __init__(self, key: str, start: int) -> None:
        self.key, self.start, self.end = key, start, start
        self.fields: dict[str, bytes] = {}
        self.problem: str | None = None

    def add(self, field: str, member: Member) -> None:
        self.end = member.end
        if member.problem:
            self.problem = self.problem or member.problem
        elif field in self.fields:
            self.problem = self.problem or f"member repeated within the sample: {field!r}"
        else:
            self.fields[field] = member.data

    def finish(self) -> Scanned:
        place = (self.start, self.end - self.start)
        if self.problem:
            return Scanned(self.key, place, None, self.problem)
        return Scanned(self.key, place, Record(self.key, self.fields))


_NO_EXTENSION = "member without extension: its name does not say what it holds"
_LABEL = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_ZEROS = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_EXTENDED = (b"x", b"g", b"L", b"K")
_WITHOUT_DATA = {  # whatever size they claim
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "pipe",
}


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member: ``dir/0001.seg.PNG`` is field ``seg.png`` of ``dir/0001``. None without extension."""
    match = _LABEL.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def walk_tar(stream: IO[bytes], size: int) -> Iterator[Member]:
    """Members of a tar in order, named by their POSIX, GNU or PAX headers.

    Directories, hidden files and WebDataset's ``__meta__`` members are passed over; links and devices are given as
    problems and never followed.

    Args:
        stream: at the start of the tar, or of a cut out of one.
        size: bytes of it.
    """
    start, extended = None, {}
    for entry in _entries(stream, size):
        start = entry.start if start is None else start
        if entry.problem is None and entry.kind in _EXTENDED:
            try:
                extended |= _extension(entry)
                continue
            except ValueError:
                entry = entry._replace(problem=f"damaged extended header at byte {entry.start}")
        name = extended.get("path") or entry.name
        problem = entry.problem or _refusal(entry, extended)
        if problem or not _is_passed_over(name, entry.kind):
            yield Member(name, start, entry.end, entry.data, problem, fatal=entry.problem is not None)
        start, extended = None, {}


class _Entry(NamedTuple):
    """A header and what follows it."""

    name: str
    kind: bytes
    start: int
    end: int
    length: int
    data: bytes = b""
    problem: str | None = None


def _entries(stream: IO[bytes], size: int) -> Iterator[_Entry]:
    """All headers in order, extended ones too, with their data.

    Blocks of zeros do not end the walk, since tars are often concatenated; after a damaged header it goes on at the
    next sound one.
    """
    position, damaged = 0, False
    while position < size:
        start, header = position, stream.read(BLOCK)
        position += BLOCK
        if header == _ZEROS:
            continue
        if len(header) < BLOCK:
            yield _Entry("", b"", start, size, 0, problem=f"truncated shard: ends inside a header at byte {size}")
            return
        parsed = _parse_header(header)
        if parsed is None:
            if not damaged:
                yield _Entry("", b"", start, position, 0, problem=f"damaged tar header at byte {start}")
            damaged = True
            continue
        name, kind, length = parsed
        damaged = False
        if position + length > size:
            reason = f"truncated shard: {size - position} of {length} bytes of {name!r}"
            yield _Entry(name, kind, start, size, length, problem=reason)
            return
        padded = -(-length // BLOCK) * BLOCK
        if length > MAX_MEMBER:
            data = b""
            stream.seek(padded, io.SEEK_CUR)
        else:
            data = stream.read(length)  # apart from its padding: cutting that off would copy the member
            stream.read(padded - length)
        position += padded
        yield _Entry(name, kind, start, min(position, size), length, data)


def _parse_header(header: bytes) -> tuple[str, bytes, int] | None:
    """(name, type, bytes of data) of a tar header, or None where the checksum or a number is wrong."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        raw = header[124:136]
        length = int.from_bytes(raw[1:], "big") if raw[0] == 0x80 else int(raw.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or length < 0:
        return None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    kind = header[156:157]
    return _decode(name), kind, 0 if kind in _WITHOUT_DATA else length


def _extension(entry: _Entry) -> dict[str, str]:
    """What an extended header says of the member that follows. ValueError where its records do not add up."""
    if entry.kind == b"L":
        return {"path": _decode(entry.data.rstrip(b"\0"))}
    records, data = {}, entry.data if entry.kind == b"x" else b""
    while data:  # PAX: "length key=value\n", the length counting itself
        digits, _, _ = data.partition(b" ")
        length = int(digits)
        if not len(digits) < length <= len(data):
            raise ValueError(f"record of {length} bytes in {len(data)}")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        records[_decode(key)] = _decode(value)
        data = data[length:]
    return records


def _refusal(entry: _Entry, extended: dict[str, str]) -> str | None:
    """Why a sound member is not read, if it is not."""
    if entry.kind in _WITHOUT_DATA and entry.kind != b"5":
        return f"{_WITHOUT_DATA[entry.kind]} in the tar, ignored"
    if entry.length > MAX_MEMBER or "size" in extended:  # PAX gives a size where the header has no room for it
        return f"member too large, the limit is {MAX_MEMBER} bytes"
    if entry.kind not in (*_REGULAR, b"5") or any(key.startswith("GNU.sparse") for key in extended):
        return f"member of tar type {entry.kind!r} is not a plain file, ignored"
    return None


def _is_passed_over(name: str, kind: bytes) -> bool:
    base = name.rpartition("/")[2]
    return kind == b"5" or not base or base.startswith(".") or re.match(r"__[^/]*__($|/)", name) is not None


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------------ parquet


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
