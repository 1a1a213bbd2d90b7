"""Encoded files out of a record's fields. Paths and addresses in them are never opened."""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import Any

from mm.data.mapping.fields import BrokenField, kind_of, look_up, missing
from mm.data.mapping.record import Fields
from mm.sample import BrokenSample


def first_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    """Files of the first field that holds any.

    A field that is empty, or in JSON that cannot be read, is passed over if another holds a file.

    Raises:
        BrokenSample: there is none, or what is there is no file.
    """
    problem: BrokenSample | None = None
    for path in paths:
        try:
            value = look_up(fields, path)
        except BrokenField as error:
            problem = problem or error
            continue
        if _is_empty(value):
            problem = problem or BrokenSample(f"empty file: {path!r}")
        elif found := files_of(value, path, base64):
            return found
    raise problem or BrokenSample(missing(paths, fields))


def all_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    """Files of all fields that are there."""
    return [data for path in paths for data in files_of(look_up(fields, path), path, base64)]


def files_of(value: Any, path: str, base64: bool) -> list[bytes]:
    """Encoded files of a field: bytes, Hugging Face's ``{bytes, path}``, text in base64, or a list of these.

    A null in the list is an error: without it, the files after it would take the places of those before.
    """
    if value is None:
        return []
    if isinstance(value, list):
        if None in value:
            raise BrokenSample(f"no file: {path!r} holds a null at place {value.index(None)} of its list")
        return [data for one in value for data in files_of(one, path, base64)]
    if isinstance(value, dict):
        if value.get("bytes") is None:
            raise BrokenSample(f"no file: {path!r} holds a path or an address instead of bytes")
        value = value["bytes"]
    if isinstance(value, str):
        if not base64:
            raise BrokenSample(
                f"no file: {path!r} holds the text {value[:60]!r}; paths and addresses are never opened, and base64 "
                "needs `encoding: base64` in the card"
            )
        value = from_base64(value, path)
    if not isinstance(value, bytes):
        raise BrokenSample(f"no file: {path!r} holds a {kind_of(value)}")
    if not value:
        raise BrokenSample(f"empty file: {path!r}")
    return [value]


def from_base64(text: str, path: str) -> bytes:
    """The bytes behind base64, with or without ``data:image/jpeg;base64,`` before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenSample(f"broken base64: {path!r} holds {text[:60]!r}: {error}") from error


def _is_empty(value: Any) -> bool:
    """Whether a field holds a file of no bytes."""
    data = value.get("bytes") if isinstance(value, dict) else value
    return isinstance(data, bytes | str) and not data
