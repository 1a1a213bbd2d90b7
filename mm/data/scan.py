"""The rows of a shard's index, from one pass over the shard that decodes nothing.

    Record ──card──▶ Sample ──header──▶ Row (key, place, characters, media facts)
               └─ broken ──▶ Row with the reason

No record can end the pass, whatever is in it: what cannot be written down as a row is an error with its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mm.data.card import Card
from mm.data.mapping import reading_a_record
from mm.data.shards import Place, Record, Scanned, Shard
from mm.data.unread import Unread
from mm.media import BrokenMedia, facts
from mm.sample import BrokenSample, Text, encodable, encodable_key

MEDIA = pa.struct([("modality", pa.int8()), ("first", pa.int32()), ("second", pa.int32())])
_MOST = 2**31 - 1


class Row(NamedTuple):
    """A row of the index, or the error of a record that is no sample; dropped: see `RecordMapping.dropped`."""

    key: str
    place: Place
    characters: Sequence[int]
    media: Sequence[tuple[int, ...]]
    signature: int
    error: str | None
    dropped: int = 0


class ScannedShard(NamedTuple):
    """A pass over a shard: its table, rows before errors, and how many rows.

    dropped: files that the rows do without; unread: files that no field of the card reads
    """

    table: pa.Table
    rows: int
    dropped: int
    unread: tuple[Unread, ...]


def scan(card: Card, shard: Shard) -> ScannedShard:
    """All rows and errors of a shard.

    Raises:
        OSError: the disk or the network failed, which says nothing about the data.
    """
    rows: list[Row] = []
    errors: list[Row] = []
    unread = card.unread_files()
    for scanned in shard.scan():
        row = _row(card, scanned)
        (rows if row.error is None else errors).append(row)
        if unread is not None and scanned.record is not None:
            unread.add(scanned.key, scanned.record.fields)
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("place", pa.list_(pa.int64(), 2)),
            ("characters", pa.list_(pa.int32(), len(card.choices))),
            ("media", pa.list_(MEDIA)),
            ("signature", pa.uint64()),
            ("error", pa.string()),
        ]
    )
    columns = list(zip(*rows, *errors, strict=True)) if rows or errors else [()] * len(Row._fields)
    arrays = [pa.array(column, type) for column, type in zip(columns, schema.types, strict=False)]
    table = pa.Table.from_arrays(arrays, schema=schema)
    return ScannedShard(table, len(rows), sum(row.dropped for row in rows), unread.found() if unread else ())


def _row(card: Card, scanned: Scanned) -> Row:
    """The row of a record."""
    error = scanned.error or "no record"
    if scanned.record is not None:
        try:
            return _usable(card, scanned.record, scanned.place)
        except BrokenMedia as broken:
            error = f"broken media: {broken}"
        except BrokenSample as broken:
            error = str(broken)
    return Row(encodable_key(scanned.key), scanned.place, [0] * len(card.choices), [], 0, encodable(error))


def _usable(card: Card, record: Record, place: Place) -> Row:
    """The row of a sample; of the text all choices must be usable, since a plan may draw any.

    Raises:
        BrokenSample: the record is no sample, or no row can hold it.
    """
    samples = [card.sample(record, choice) for choice in range(len(card.choices))]
    characters = [sum(len(part.text) for part in one.parts if isinstance(part, Text)) for one in samples]
    with reading_a_record():
        media = [(part.modality.value, *map(int, facts(part))) for part in samples[0].media]
        dropped = card.mapping.dropped(record.fields)
    if any(abs(number) > _MOST for number in (*characters, *(fact for one in media for fact in one))):
        raise BrokenSample("numbers too large for the index: its media or texts claim 2³¹ or more of something")
    return Row(samples[0].key, place, characters, media, _signature(media), None, dropped)


def _signature(media: list[tuple[int, ...]]) -> int:
    if not media:
        return 0
    packed = np.asarray(media, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
