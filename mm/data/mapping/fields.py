"""The value at a path of a record's fields, and how values are named in errors."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from mm.data.json_values import TooManyValues, parse_json
from mm.data.mapping.record import Fields
from mm.sample import BrokenSample


class BrokenField(BrokenSample):
    """A field that is there and cannot be read, so that another named beside it may stand in."""


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
    """JSON behind bytes or text, with or without a byte order mark before it; anything else as it is.

    Raises:
        BrokenField: it is no JSON, or holds too many values.
    """
    if not isinstance(value, bytes | str):
        return value
    try:
        return parse_json(value.lstrip("\ufeff") if isinstance(value, str) else value)
    except TooManyValues as error:
        raise BrokenField(f"JSON too complex: {path!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenField(f"broken JSON: {path!r}: {error}") from error


def missing(paths: tuple[str, ...], fields: Fields) -> str:
    """The reason of a record that lacks all of some fields."""
    return f"missing field: {' or '.join(map(repr, paths))}; the record has {', '.join(sorted(fields)) or 'none'}"


def kind_of(value: Any) -> str:
    """The kind of a value, for errors."""
    return "null" if value is None else type(value).__name__


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60


def shown(value: Any) -> str:
    """A value as it is quoted in errors: short, however large it is and however deep it is nested."""
    return _SHORT.repr(value)
