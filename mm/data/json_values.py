"""A limit on how many values a JSON text holds, counted before they are made.

A short text may hold many: one of ``{}`` and a comma takes over 20 times as much memory as a list of objects.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_VALUES = 2**21
"""Most values in a JSON text."""

_STRING = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL
)  # without its end too: looking for it from every quote takes for ever


class TooManyValues(ValueError):
    """A JSON text of more than `MAX_VALUES` values."""


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text; of bytes, in whichever Unicode encoding they are.

    Raises:
        TooManyValues: it holds over `MAX_VALUES` values.
        ValueError: it is no JSON.
        RecursionError: it is nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if len(text) > MAX_VALUES:  # fewer characters hold fewer values
        values = count_values(text.encode("utf-8", "surrogatepass"))
        if values > MAX_VALUES:
            raise TooManyValues(f"{values} values, the limit is {MAX_VALUES}")
    return json.loads(text)


def count_values(data: bytes) -> int:
    """About how many values JSON in UTF-8 holds: exact in what is outside of its texts, which are looked
    for in long ones."""
    if _marks(data) > MAX_VALUES:
        data = _STRING.sub(b"", data)
    return _marks(data)


def _marks(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))
