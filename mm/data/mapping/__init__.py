"""How a record becomes a sample: the ``sample:`` of a data card.

    Parts   a list of parts, each read from a field, in an order  caption pairs, transcripts, questions in columns
    Chat    one field holds a conversation with media markers     LLaVA turns, message lists, question–answer lists
    Page    two lists hold the texts and pictures of a page       OBELICS, InfiMM-WebMath, MMC4

A field is named by a path: ``txt``; ``json.recaption``, a key of the JSON in ``json``; ``captions.0``, the first of a
list column. Nothing in a record is executed, opened as a path or fetched as an address.
"""

from __future__ import annotations

from mm.data.mapping.chat import MARKERS
from mm.data.mapping.fields import look_up, prefixes
from mm.data.mapping.parse import MappingError, check_keys, parse_mapping
from mm.data.mapping.record import ROLES, RecordMapping, reading_a_record
from mm.data.mapping.words import PADDING

__all__ = [
    "MARKERS",
    "PADDING",
    "ROLES",
    "MappingError",
    "RecordMapping",
    "check_keys",
    "look_up",
    "parse_mapping",
    "prefixes",
    "reading_a_record",
]
