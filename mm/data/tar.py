"""WebDataset tars: consecutive members of equal key are a record, read without extracting anything.

    header ─▶ extended headers ─▶ Member(name, where its bytes are) ─▶ key and field ─▶ Record
              (PAX, GNU)

What a tar says of itself is not trusted: a member is read only where it and its record are within `MAX_RECORD`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import IO, NamedTuple

from mm.data.files import ShardChanged
from mm.data.hidden import is_hidden
from mm.data.shards import MAX_RECORD, Place, Record, Scanned, Shard

BLOCK = 512
MAX_EXTENDED = 1024**2
"""Most bytes of the extended headers in front of one member."""
MAX_KEYS = 2**20
"""Keys and fields of a shard that are remembered to find members that are not next to those of their sample."""
NO_END = "no end marker: the shard may have been cut off between two members"
EMPTY = "empty tar: no file in it"

_NO_EXTENSION = "member without extension: its name does not say what it holds"
_LABEL = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_OCTAL = re.compile(rb"[0-7]*")
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_ZEROS = bytes(BLOCK)
_NO_ENTRY, _DAMAGED, _CUT = b"zeros", b"damaged", b"cut"  # in place of a type, which is one byte
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


class Member(NamedTuple):
    """A regular file of a tar: bytes ``start:end`` of the archive with its headers and padding.

    `size` bytes from `offset` are its content, which is not read yet. `problem` says why it is not to be read. `fatal`:
    something may be missing around it, so the sample that it belongs to is not to be trusted.
    """

    name: str
    start: int
    end: int
    offset: int = 0
    size: int = 0
    problem: str | None = None
    fatal: bool = False


class TarShard(Shard):
    """WebDataset: consecutive members with equal names up to the first dot of the base name are one record."""

    def _scan(self) -> Iterator[Scanned]:
        self.refuse_head()
        self.hidden, size = 0, self.file.stat().size
        group: _Group | None = None
        earlier = _EarlierKeys()
        empty, cut = True, False
        with self.file.stream() as stream:
            for member in walk_tar(stream, size):
                empty, cut = False, cut or member.fatal
                if member.problem is None and is_hidden(member.name):
                    self.hidden += 1
                    continue
                label = split_name(member.name)
                if not member.fatal and (member.problem or label is None):
                    place = (member.start, member.end - member.start)
                    yield Scanned(member.name, place, None, member.problem or _NO_EXTENSION)
                    continue
                key, field = label or ("", "")
                if group is not None and key and key != group.key:
                    yield group.finish(earlier)
                    group = None
                if group is None:
                    group = _Group(key, member.start)
                group.add(field, member, stream)
        if group is not None:
            yield group.finish(earlier)
        if empty:
            yield Scanned("", (size, 0), None, EMPTY)
        elif not cut and self.file.read(max(0, size - BLOCK), BLOCK) != _ZEROS:
            yield Scanned("", (size, 0), None, NO_END)

    def _record(self, place: Place) -> Record:
        offset, size = place
        stream = io.BytesIO(self.file.read(offset, size))
        key, fields = "", {}
        for member in walk_tar(stream, len(stream.getbuffer())):
            label = split_name(member.name)
            if member.fatal:
                raise ShardChanged(f"{self.path}: no sample at bytes {offset}:{offset + size}: {member.problem}")
            if label and not member.problem and not is_hidden(member.name):
                key, field = label
                stream.seek(member.offset)
                fields[field] = stream.read(member.size)
        if not fields:
            raise ShardChanged(f"{self.path}: no sample at bytes {offset}:{offset + size}")
        return Record(key, fields)


class _Group:
    """The members of one record, as they come by. Never holds more than `MAX_RECORD` bytes."""

    def __init__(self, key: str, start: int) -> None:
        self.key, self.start, self.end = key, start, start
        self.fields: dict[str, bytes] = {}
        self.size = 0
        self.problem: str | None = None

    def add(self, field: str, member: Member, stream: IO[bytes]) -> None:
        """Reads a member, unless the record is broken."""
        self.end = member.end
        self.size += member.size
        if self.problem is None:
            self.problem = member.problem or self._refusal(field)
            if self.problem is not None:
                self.fields = dict.fromkeys(self.fields, b"")
        if self.problem is None:
            stream.seek(member.offset)
            self.fields[field] = stream.read(member.size)
        elif field:
            self.fields[field] = b""

    def _refusal(self, field: str) -> str | None:
        if field in self.fields:
            return f"member repeated within the sample: {field!r}"
        if self.size > MAX_RECORD:
            return f"record too large: {self.size} bytes up to its member {field!r}, the limit is {MAX_RECORD}"
        return None

    def finish(self, earlier: _EarlierKeys) -> Scanned:
        place = (self.start, self.end - self.start)
        if self.key and earlier.lacked(self.key, self.fields) and self.problem is None:
            listed = ", ".join(sorted(self.fields)[:5])
            self.problem = (
                f"members of a sample are not adjacent: {listed} of {self.key!r} and its other members have other "
                "samples between them; write the tar anew, sorted by name"
            )
        if self.problem:
            return Scanned(self.key, place, None, self.problem)
        return Scanned(self.key, place, Record(self.key, self.fields))


class _EarlierKeys:
    """Keys of the records so far and the fields of each, as digests: `MAX_KEYS` of them, whatever the names' length."""

    def __init__(self) -> None:
        self._fields: dict[int, frozenset[int]] = {}
        self._same: dict[frozenset[int], frozenset[int]] = {}  # most records have the same fields
        self._room = MAX_KEYS

    def lacked(self, key: str, fields: Iterable[str]) -> bool:
        """Whether an earlier record of this key has none of the fields; remembers them.

        A record that repeats a field is another sample with the same key, as tars that were joined have them.
        """
        digest, found = _digest(key), frozenset(map(_digest, fields))
        before = self._fields.get(digest)
        if before is None and self._room <= 0:
            return False
        known = found if before is None else found | before
        if known not in self._same:
            self._room -= len(known)
            self._same[known] = known
        self._room -= before is None
        self._fields[digest] = self._same[known]
        return before is not None and not before & found


def _digest(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member: ``dir/0001.seg.PNG`` is field ``seg.png`` of ``dir/0001``. None without extension."""
    match = _LABEL.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


# ------------------------------------------------------------------------------------------------------------ headers


def walk_tar(stream: IO[bytes], size: int) -> Iterator[Member]:
    """Members of a tar in order, named by their POSIX, GNU or PAX headers.

    Directories and WebDataset's ``__meta__`` members are skipped; links and devices are given as problems and never
    followed. The caller may seek in the stream between two members.

    Args:
        stream: at the start of the tar, or of a cut out of one.
        size: bytes of it.
    """
    position, damaged = 0, False
    extended: _Extended | None = None
    while position < size:
        entry = _read_entry(stream, position, size, extended.size if extended else None)
        position = entry.end
        if entry.kind == _NO_ENTRY or (entry.kind == _DAMAGED and damaged):
            continue  # zeros do not end the walk, since tars are often joined
        damaged = entry.kind == _DAMAGED
        if entry.problem is None and entry.kind in _EXTENDED:
            extended = extended or _Extended(entry.start)
            extended.add(entry, stream)
            continue
        member = _member(entry, extended or _Extended(entry.start))
        if member.problem or not _is_passed_over(member.name, entry.kind):
            yield member
        extended = None


class _Entry(NamedTuple):
    """A header and where what follows it is: `length` bytes in front of `end`, without their padding."""

    name: str
    kind: bytes
    start: int
    end: int
    length: int = 0
    problem: str | None = None


def _read_entry(stream: IO[bytes], start: int, size: int, extended_size: int | None) -> _Entry:
    """The header at a place of a tar of `size` bytes, of kind `_NO_ENTRY` or `_DAMAGED` if there is none.

    Args:
        extended_size: what an extended header says of the member's size, which goes before what its own header says.
    """
    stream.seek(start)
    header = stream.read(BLOCK)
    if header == _ZEROS:
        return _Entry("", _NO_ENTRY, start, start + BLOCK)
    if len(header) < BLOCK:
        return _Entry("", _CUT, start, size, problem=f"truncated shard: ends inside a header at byte {size}")
    parsed = _parse_header(header)
    if parsed is None:
        return _Entry("", _DAMAGED, start, start + BLOCK, problem=f"damaged tar header at byte {start}")
    name, kind, length = parsed
    problem = None
    if extended_size is not None and kind not in _EXTENDED and kind not in _WITHOUT_DATA:
        if length not in (0, extended_size):
            problem = f"damaged tar header at byte {start}: {length} bytes, its extended header says {extended_size}"
        length = extended_size
    there = size - start - BLOCK
    if length > there:
        reason = f"truncated shard: {there} of {length} bytes of {name!r}"
        return _Entry(name, kind, start, size, length, reason)
    return _Entry(name, kind, start, min(start + BLOCK - -length // BLOCK * BLOCK, size), length, problem)


def _parse_header(header: bytes) -> tuple[str, bytes, int] | None:
    """(name, type, bytes of data) of a tar header, or None where the checksum or a number is wrong."""
    checksum, length = _number(header[148:156]), _number(header[124:136])
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or length is None:
        return None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    kind = header[156:157]
    return _decode(name), kind, 0 if kind in _WITHOUT_DATA else length


def _number(field: bytes) -> int | None:
    """A number in a header, octal or base-256; None where it is neither, negative, or over 63 bits."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
        return number if number < 2**63 else None
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


class _Extended:
    """What the extended headers in front of a member, from byte `start`, say of it."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.path: str | None = None
        self.size: int | None = None
        self.sparse = False
        self.problem: str | None = None

    def add(self, entry: _Entry, stream: IO[bytes]) -> None:
        """Reads one of them. Those of no use here (``g``, ``K``) count by their size only."""
        if entry.end - self.start > MAX_EXTENDED + 2 * BLOCK:
            total = entry.end - self.start
            self.problem = f"extended header too large: {total} bytes at byte {self.start}, the limit is {MAX_EXTENDED}"
        if self.problem is not None or entry.kind not in (b"L", b"x"):
            return
        data = stream.read(entry.length)
        if entry.kind == b"L":
            self.path = _decode(data.rstrip(b"\0"))
            return
        try:
            self._read_pax(data)
        except ValueError as error:
            self.problem = f"damaged extended header at byte {entry.start}: {error}"

    def _read_pax(self, data: bytes) -> None:
        """Reads records ``"length key=value\\n"``, the length counting itself.

        Raises:
            ValueError: they do not add up.
        """
        position = 0
        while position < len(data):
            space = data.find(b" ", position, position + 20)
            digits = data[position : max(space, position)]
            end = position + int(digits) if _DECIMAL.fullmatch(digits) else 0
            if not space < end <= len(data) or data[end - 1 : end] != b"\n":
                raise ValueError(f"its record at byte {position} of {len(data)} has no sound length")
            key, _, value = data[space + 1 : end - 1].partition(b"=")
            if key == b"path":
                self.path = _decode(value)
            elif key == b"size" and value:
                if not _DECIMAL.fullmatch(value):
                    raise ValueError(f"the size of its member is {value[:32]!r}, expected a decimal number")
                self.size = int(value)
            self.sparse |= key.startswith(b"GNU.sparse")
            position = end


def _member(entry: _Entry, extended: _Extended) -> Member:
    """An entry under the name that its extended headers give it."""
    if extended.problem is not None:  # it may have had another name, and another size
        return Member("", extended.start, entry.end, problem=extended.problem, fatal=True)
    name = extended.path or entry.name
    if entry.problem is not None:
        return Member(name, extended.start, entry.end, problem=entry.problem, fatal=True)
    problem = _refusal(entry, extended.sparse)
    return Member(name, extended.start, entry.end, entry.start + BLOCK, entry.length, problem)


def _refusal(entry: _Entry, sparse: bool) -> str | None:
    """Why a sound member is not read, if it is not."""
    if entry.kind in _WITHOUT_DATA and entry.kind != b"5":
        return f"{_WITHOUT_DATA[entry.kind]} in the tar, ignored"
    if entry.length > MAX_RECORD:
        return f"member too large: {entry.length} bytes, the limit is {MAX_RECORD}"
    if sparse:
        return "sparse file in the tar, ignored: write the tar anew without --sparse"
    if entry.kind not in (*_REGULAR, b"5"):
        return f"member of tar type {entry.kind!r} is not a plain file, ignored"
    return None


def _is_passed_over(name: str, kind: bytes) -> bool:
    return kind == b"5" or not name.rpartition("/")[2] or re.match(r"__[^/]*__($|/)", name) is not None


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
