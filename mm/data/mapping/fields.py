"""Reading the fields of a record: the value at a path, and the words and files in it."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

from mm.data.mapping.record import Fields
from mm.sample import BrokenSample


def look_up(fields: Fields, path: str) -> Any:
    """Value at a field path, or None. The longest field name wins; what remains of the path goes into its value."""
    if path in fields:
        return fields[path]
    steps = path.split(".")
    for cut in range(len(steps) - 1, 0, -1):
        head = ".".join(steps[:cut])
        if head in fields:
            return _descend(fields[head], steps[cut:], head)
    return None


def prefixes(path: str) -> Iterator[str]:
    """All fields from which `look_up` may read a path: ``json.a.b``, ``json.a`` and ``json``."""
    steps = path.split(".")
    return (".".join(steps[:cut]) for cut in range(len(steps), 0, -1))


def _descend(value: Any, steps: list[str], head: str) -> Any:
    for step in steps:
        value = parsed(value, head)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def parsed(value: Any, path: str) -> Any:
    """JSON behind bytes or text; anything else as it is."""
    if not isinstance(value, bytes | str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"broken JSON: {path!r}: {error}") from error


def first_words(fields: Fields, paths: tuple[str, ...]) -> str:
    """Text of the first field that holds any, without white space around it."""
    present = ""
    for path in paths:
        value = look_up(fields, path)
        if value is None:
            continue
        if words := words_of(value, path).strip():
            return words
        present = path
    raise BrokenSample(f"empty text: {present!r}" if present else missing(paths, fields))


def words_of(value: Any, path: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenSample(f"text is not UTF-8: {path!r}: {error.reason} at byte {error.start}") from error
    if isinstance(value, str):
        return checked(value, path)
    raise BrokenSample(f"not a text: {path!r} holds a {kind_of(value)}")


def checked(words: str, path: str) -> str:
    """The words, if they can be encoded: JSON may hold half a surrogate pair, on which a tokenizer would fail later."""
    try:
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenSample(f"text is not UTF-8: {path!r}: {error.reason} at character {error.start}") from error
    return words


def first_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    """Files of the first field that holds any."""
    for path in paths:
        if files := files_of(look_up(fields, path), path, base64):
            return files
    raise BrokenSample(missing(paths, fields))


def all_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    return [data for path in paths for data in files_of(look_up(fields, path), path, base64)]


def files_of(value: Any, path: str, base64: bool) -> list[bytes]:
    """Encoded files of a field: bytes, Hugging Face's ``{bytes, path}``, text in base64, or a list of these."""
    if value is None:
        return []
    if isinstance(value, list):
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


def missing(paths: tuple[str, ...], fields: Fields) -> str:
    return f"missing field: {' or '.join(map(repr, paths))}; the record has {', '.join(sorted(fields)) or 'none'}"


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__
