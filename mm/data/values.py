"""Rows of Arrow batches as Python values, of which one that cannot be converted costs itself only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MAX_ROW = 512 * 1024**2
"""Most bytes that the values of a row may take."""
AT_ONCE = 64 * 1024**2
"""Bytes of values up to which a batch is converted at once, not row by row."""

_OBJECT = 64  # bytes of a Python object and of what refers to it, about
_UNCONVERTIBLE = (
    *(ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, RecursionError),
    pa.ArrowException,
)
"""What Arrow raises for text that is not UTF-8, dates behind the year 9999, zones of time that there are not, …"""


class BadRow(ValueError):
    """A row that is no record; the message says why."""


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a batch, or why there is none."""
    if value_bytes(batch) <= AT_ONCE:
        try:
            rows = batch.to_pylist()
        except _UNCONVERTIBLE:
            rows = None  # found row by row
        if rows is not None:
            yield from rows
            return
    for number in range(batch.num_rows):
        try:
            yield row_of(batch, number)
        except BadRow as bad:
            yield bad


def row_of(batch: pa.RecordBatch, number: int) -> dict[str, Any]:
    """A row of a batch by column.

    Raises:
        BadRow: a value in it has no form in Python, or all of them are too large.
    """
    row = batch.slice(number, 1)
    size = value_bytes(row)
    if size > MAX_ROW:
        raise BadRow(f"record too large: its row takes {size} bytes, the limit is {MAX_ROW}")
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, row.columns, strict=True):
        try:
            values[name] = column.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadRow(f"text is not UTF-8: column {name!r}: {error}") from error
        except _UNCONVERTIBLE as error:
            raise BadRow(f"unreadable value: column {name!r}, {column.type}: {error}") from error
    return values


def value_bytes(batch: pa.RecordBatch) -> int:
    """About what the values of a batch take as Python objects, without making them."""
    return sum(map(_bytes, batch.columns))


def _bytes(array: pa.Array) -> int:
    if isinstance(array, pa.ExtensionArray):
        return _bytes(array.storage)
    kind = array.type
    objects = len(array) * _OBJECT
    if pa.types.is_dictionary(kind):
        lengths = pc.call_function("take", [_lengths(array.dictionary), array.indices])
        return objects + (pc.call_function("sum", [lengths]).as_py() or 0)
    if pa.types.is_struct(kind):
        return objects + sum(map(_bytes, array.flatten()))
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return objects + _bytes(array.keys.slice(first, last - first)) + _bytes(array.items.slice(first, last - first))
    if pa.types.is_nested(kind):
        return objects + _bytes(array.flatten())
    return objects + array.nbytes


def _lengths(dictionary: pa.Array) -> pa.Array:
    """(entries,) int64 bytes of each entry; of numbers the mean."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    if any(test(dictionary.type) for test in binary):
        return pc.call_function("binary_length", [dictionary]).cast(pa.int64())
    return pa.array([dictionary.nbytes // max(len(dictionary), 1)] * len(dictionary), pa.int64())
