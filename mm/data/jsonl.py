"""JSON lines read where they lie: one object a line, its keys are the fields of a record.

    {"text": "…", "meta": {"url": "…"}}      place = (byte offset of the line, bytes of it)
    {"text": "…"}

A line is found by its place without what is before it, so a file of any size is read at random. A line that cannot be
read is an error with its number and costs no other line.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from mm.data.files import ShardChanged
from mm.data.json_values import TooManyValues, parse_json
from mm.data.shards import Place, Record, Scanned, Shard

MAX_LINE = 64 * 1024**2
"""Longest line that is read, in bytes."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARRAY = "a JSON array, not JSON lines: write one object a line, for instance with `jq -c '.[]' FILE.json > FILE.jsonl`"


class JsonlShard(Shard):
    """A file of JSON lines, of which empty ones are passed over. A record's key is where its line is, ``byte 1024``."""

    def _scan(self) -> Iterator[Scanned]:
        self.refuse_head()
        with self.file.stream() as stream:
            for found, line in enumerate(lines(stream)):
                place = (line.offset, line.size)
                if found == 0 and line.data.lstrip().startswith(b"["):
                    yield Scanned("", (0, self.file.stat().size), None, _ARRAY)
                    return
                try:
                    record, error = Record(_key(place), parse_object(line)), None
                except ValueError as problem:
                    record, error = None, f"{problem}, in line {line.number}"
                yield Scanned(_key(place), place, record, error)

    def _record(self, place: Place) -> Record:
        offset, size = place
        data = self.file.read(offset, size)
        try:
            if len(data) < size:
                raise ValueError(f"the file ends after {len(data)} of them")
            return Record(_key(place), parse_object(Line(0, offset, size, data)))
        except ValueError as error:
            raise ShardChanged(f"{self.path}: no record at bytes {offset}:{offset + size}: {error}") from error


class Line(NamedTuple):
    """A line without what ends it.

    number: from 1, empty lines counted
    offset, size: where it is in the file
    data: its bytes; of a line over `MAX_LINE`, the beginning
    cut: nothing ends it but the end of the file
    """

    number: int
    offset: int
    size: int
    data: bytes
    cut: bool = False


def lines(stream: IO[bytes]) -> Iterator[Line]:
    """The lines that are not empty. Only a line feed ends one: JSON may hold U+2028 and the like as they are."""
    offset = 0
    for number in itertools.count(1):
        data = end = stream.readline(MAX_LINE)
        if not data:
            return
        size = len(data)
        while len(end) == MAX_LINE and not end.endswith(b"\n"):
            end = stream.readline(MAX_LINE)
            size += len(end)
        ended = end.endswith(b"\n")
        mark = len(BYTE_ORDER_MARK) if number == 1 and data.startswith(BYTE_ORDER_MARK) else 0
        if data.strip():
            yield Line(number, offset + mark, size - mark - ended, data[mark:].removesuffix(b"\n"), cut=not ended)
        offset += size


def parse_object(line: Line) -> dict[str, Any]:
    """The object in a line.

    Raises:
        ValueError: there is none; says why.
    """
    if line.size > len(line.data):
        raise ValueError(f"line too long: {line.size} bytes, the limit is {MAX_LINE}")
    try:
        record = parse_json(line.data.decode("utf-8"))
    except TooManyValues as error:
        raise ValueError(f"line too complex: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_reason(line, error)}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"broken record: a {type(record).__name__} instead of an object with keys")
    return record


def _reason(line: Line, error: Exception) -> str:
    if line.cut:
        return "truncated shard: the last line has no end and is no JSON"
    return "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else "broken JSON"


def _key(place: Place) -> str:
    return f"byte {place[0]}"
