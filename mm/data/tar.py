"""WebDataset tars: consecutive members of equal key are a record, read without extracting anything.

header ─▶ (extended headers) ─▶ Member(name, bytes) ─▶ key and field ─▶ Record
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from mm.data.files import ShardChanged, refuse_compressed
from mm.data.shards import Place, Record, Scanned, Shard

BLOCK = 512
MAX_MEMBER = 1024**3
"""Largest member of a tar that is read into memory, in bytes."""
NO_END = "no end marker: the shard may have been cut off between two members"


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
