"""Footers and page headers of parquet files: where column chunks are, and what decoding them will take.

    file:          … column chunks … │ footer │ its length │ PAR1
    column chunk:  header │ dictionary │ header │ page │ …         footer, header: Thrift's compact protocol

No footer can be trusted to say what comes out of a chunk, so its pages are looked at. Footers are read here as well:
where they are damaged, asking pyarrow for a column chunk ends the process (C++ exceptions that it lets through).
Format: https://github.com/apache/parquet-format, ``FileMetaData`` and ``PageHeader`` in parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_DEPTH = 16
"""Structs and lists inside each other that are read; the deepest of the format has 8."""

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # PageType
_DICTIONARY_ENCODINGS = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class DamagedPages(ValueError):
    """A footer or a column chunk that is not what the format says."""


class Chunk(NamedTuple):
    """Where a column chunk is said to be: `size` bytes from `start`, `uncompressed` ones without compression."""

    start: int
    size: int
    uncompressed: int


class RowGroup(NamedTuple):
    """A row group as its footer has it, with the chunks of all columns in the order of the schema."""

    rows: int
    chunks: tuple[Chunk, ...]


class Page(NamedTuple):
    """A page of a column chunk.

    size: bytes of it without compression
    values: number of values in it, nulls included
    is_dictionary: whether it holds the dictionary; coded: whether its values are numbers of the dictionary's
    """

    size: int
    values: int
    is_dictionary: bool
    coded: bool


def read_footer(footer: bytes) -> list[RowGroup]:
    """The row groups of a footer.

    Raises:
        DamagedPages: it cannot be read.
    """
    try:
        described, _ = _struct(footer, 0, 0)
        groups = [RowGroup(group[3], tuple(_chunk(chunk[3]) for chunk in group[1])) for group in described[4]]
    except (KeyError, IndexError, TypeError) as error:
        raise DamagedPages("its footer does not describe row groups") from error
    if any(not isinstance(number, int) or number < 0 for group in groups for number in (group.rows, *_flat(group))):
        raise DamagedPages("its footer holds a negative number of rows or bytes")
    return groups


def _chunk(described: dict[int, Any]) -> Chunk:
    data, dictionary = described[9], described.get(11, 0)
    start = dictionary if 0 < dictionary < data else data  # as Arrow reads it
    return Chunk(start, described[7], described[6])


def _flat(group: RowGroup) -> Iterator[int]:
    for chunk in group.chunks:
        yield from chunk


def read_pages(chunk: bytes) -> Iterator[Page]:
    """The pages of a column chunk.

    Raises:
        DamagedPages: a header cannot be read, or a page ends behind the chunk.
    """
    position = 0
    while position < len(chunk):
        try:
            header, start = _struct(chunk, position, 0)
            kind, size, stored = (int(header[field]) for field in (1, 2, 3))
            page = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
            values, encoding = int(page.get(1, 0)), page.get(4 if kind == _DATA_V2 else 2)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DamagedPages(f"no page header at byte {position} of a column chunk") from error
        if min(size, stored, values) < 0 or start + stored > len(chunk):
            raise DamagedPages(f"a page at byte {position} of a column chunk of {len(chunk)} bytes ends behind it")
        is_dictionary = kind == _DICTIONARY
        yield Page(size, values, is_dictionary, not is_dictionary and encoding in _DICTIONARY_ENCODINGS)
        position = start + stored


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct by number, and where it ends. IndexError where the bytes end before it."""
    if depth > MAX_DEPTH:
        raise DamagedPages("structs are nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, at)
    if kind in (_TRUE, _FALSE, _BYTE):  # of a list, where a bool takes a byte
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return None, at + length
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    if kind in (_LIST, _SET):
        count, at = data[at] >> 4, at + 1
        inner = data[at - 1] & 15
        if count == 15:
            count, at = _varint(data, at)
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner, depth + 1)
            values.append(value)
        return values, at
    raise DamagedPages(f"a field of type {kind}, which the format does not have")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            raise DamagedPages("a number of over 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return (number >> 1) ^ -(number & 1), at
