"""Whether the card that a builder writes can read the records that it writes. What it cannot is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.data.mapping import parse_mapping
from mm.data.shards import MAX_RECORD
from mm.data.sources.records import nested
from mm.data.sources.writer import Unusable, encode
from mm.media import facts
from mm.sample import MediaPart

MOST_NESTED = 100
"""Levels of lists and objects in the JSON of a record. A parser's own limit depends on what called it."""


class CardCheck:
    """Check of records against the ``sample:`` of a card, before they are written."""

    def __init__(self, sample: Any) -> None:
        self._mapping = parse_mapping(sample)

    def fields(self, fields: Mapping[str, Any]) -> dict[str, bytes]:
        """The fields of a record as a shard holds them, of which the card makes a sample with sound media headers.

        Raises:
            BrokenSample: it does not.
        """
        try:
            encoded = {extension: encode(extension, value) for extension, value in fields.items()}
        except UnicodeEncodeError as error:
            raise Unusable(f"text is not UTF-8: {error.reason}") from error
        except RecursionError as error:
            raise Unusable(f"broken JSON: nested more than {MOST_NESTED} deep") from error
        if sum(map(len, encoded.values())) > MAX_RECORD:
            raise Unusable(f"file too large: over the limit of {MAX_RECORD} bytes of a record")
        if any(extension.endswith("json") and _is_nested_too_deep(data) for extension, data in encoded.items()):
            raise Unusable(f"broken JSON: nested more than {MOST_NESTED} deep")
        for choice in range(len(self._mapping.choices)):
            for part in self._mapping.parts(encoded, choice):
                if isinstance(part, MediaPart):
                    facts(part)
        return encoded


def _is_nested_too_deep(text: bytes) -> bool:
    brackets = text.count(b"[") + text.count(b"{")
    return brackets > MOST_NESTED and nested(text.decode("latin-1")) > MOST_NESTED
