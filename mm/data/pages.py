"""Page headers of parquet column chunks: what decoding them will take, which no footer can be trusted to say.

    column chunk:  header │ dictionary │ header │ page │ header │ page │ …      header: Thrift's compact protocol

Format: https://github.com/apache/parquet-format, ``PageHeader`` in parquet.thrift, and Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_DEPTH = 16
"""Structs and lists inside each other that a header may have; the deepest of the format has 3."""

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # PageType
_DICTIONARY_ENCODINGS = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class DamagedPages(ValueError):
    """A column chunk whose pages do not follow each other as its footer says."""


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
        raise DamagedPages("a page header is nested too deeply")
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
        for _ in range(count):
            _, at = _value(data, at, inner, depth + 1)
        return None, at
    raise DamagedPages(f"a page header has a field of type {kind}")  # maps: the format has none


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
            raise DamagedPages("a page header holds a number of over 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return (number >> 1) ^ -(number & 1), at
