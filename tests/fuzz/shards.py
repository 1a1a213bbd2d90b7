"""Shards with mutated records, headers and columns: JSON lines, tars and parquet files."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm.data.card import Card
from tests import shard_files
from tests.fuzz import mutate
from tests.shard_files import jpeg

CHAT = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat"},
]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat"},
]
FORMS_OF_RECORDS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ([{"image": {"from": ["webp", "png"], "encoding": "base64"}}, {"text": ["txt", "meta.caption"]}], {}),
    ({"chat": "chat", "images": ["png"], "encoding": "base64"}, {}),
    ({"chat": "messages", "images": ["images"], "encoding": "base64", "place": "markers"}, {}),
    ({"chat": "chat", "images": "png", "encoding": "base64", "place": "front"}, {"key": "meta.id"}),
    ({"texts": "texts", "images": "pictures", "encoding": "base64"}, {}),
    ({"texts": "texts", "images": "matched", "at": "at", "file": "data", "encoding": "base64"}, {}),
    ([{"text": [{"from": "txt", "p": 0.5}, {"from": "meta.caption", "p": 0.5}]}], {"key": "id"}),
)
"""``sample:`` of a card, with further keys of it."""


def sound_record(number: int) -> dict[str, Any]:
    picture = base64.b64encode(jpeg(8 + number, 9, format="PNG")).decode()
    return {
        "id": number,
        "txt": f"caption {number}",
        "png": picture,
        "meta": {"caption": f"a caption {number}", "id": f"key {number}"},
        "chat": CHAT,
        "messages": MESSAGES,
        "images": [picture],
        "texts": ["one", None, "two"],
        "pictures": [None, picture, None],
        "matched": [{"at": 1, "data": picture}],
    }


def write_card(draw: random.Random, folder: Path, shard: str, format: str) -> set[str]:
    """A card of some form; returns the fields that it reads, on which changes tell more than on others."""
    sample, more = draw.choice(FORMS_OF_RECORDS)
    text = json.dumps(sample)
    if format == "parquet":  # which holds bytes
        text = text.replace(', "encoding": "base64"', "")
    card = shard_files.write_card(folder, shard, json.loads(text), format, name="card", **more)
    return {path.partition(".")[0] for path in Card.load(card).mapping.paths()} | {str(more.get("key", "txt"))[:4]}


# --------------------------------------------------------------------------------------------------------- JSON lines


def write_jsonl(draw: random.Random, folder: Path) -> None:
    read = write_card(draw, folder, "a.jsonl", "jsonl")
    records: list[Any] = [{name: one for name, one in sound_record(n).items() if name in read} for n in range(4)]
    records[1] = mutate.tree(draw, records[1], draw.choice((1, 1, 2, 5)))
    lines = [json.dumps(record, ensure_ascii=draw.random() < 0.5) for record in records]
    pick = draw.randrange(6)
    if pick == 0:
        lines[2] = lines[2].replace("caption", draw.choice(("\\ud800", "\\udc00\\ud800", "\\u0000", "\\u2028")))
    if pick == 1:
        depth = draw.choice((900, 5_000, 200_000))
        lines[2] = '{"txt": ' + "[" * depth + "]" * depth * draw.randrange(2) + "}"
    data = draw.choice(("\n", "\r\n", "\n\n", "\u2028")).join(lines).encode("utf-8", "surrogatepass")
    if pick == 2:
        data = mutate.bytes_of(draw, data, draw.choice((1, 3, 10)), ends=64)
    if pick == 3:
        data = b"\xef\xbb\xbf" + data
    (folder / "a.jsonl").write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------- tar


def _header(name: bytes, size: bytes, kind: bytes, prefix: bytes = b"") -> bytes:
    """A ustar header with a right checksum, whatever its fields hold."""
    header = bytearray(512)
    header[0:100] = name[:100].ljust(100, b"\0")
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136] = size[:12].ljust(12, b"\0")
    header[136:148], header[148:156], header[156:157] = b"00000000000\0", b" " * 8, kind[:1]
    header[257:265], header[345:500] = b"ustar\x0000", prefix[:155].ljust(155, b"\0")
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def _octal(size: int) -> bytes:
    return f"{size:011o}\0".encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    """PAX records with right lengths."""
    text = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        text += str(length).encode() + body
    return text


def _member(draw: random.Random, name: str, data: bytes, odd: bool) -> bytes:
    if not odd:
        return _header(name.encode(), _octal(len(data)), b"0") + _padded(data)
    stem, _, extension = name.partition(".")
    named = draw.choice(
        (
            *(name, name, f"{stem}.{draw.choice(mutate.TEXTS)}", f"{draw.choice(mutate.TEXTS)}.{extension}"),
            *(f".hidden/{name}", f"@eaDir/{name}", f"../{name}", f"/{name}", stem, f"{stem}.2.{extension}", ""),
        )
    ).encode("utf-8", "surrogatepass")[:60_000]
    size = draw.choice(
        (
            *(_octal(len(data)),) * 4,
            *(_octal(0), _octal(len(data) + 1), b"77777777777\0", b"\xff" * 12, b"-1", b"\x80" + bytes(11)),
            *(b"\x80" + b"\xff" * 11, b"\x80\0\0\0" + (len(data)).to_bytes(8, "big"), b"9", b"            ", b""),
        )
    )
    kind = draw.choice((b"0", b"0", b"0", b"\0", b"7", b"1", b"2", b"3", b"5", b"6", b"S", b"V", b"\xff"))
    before = b""
    pick = draw.randrange(7)
    if pick == 0:
        keys = (b"path", b"size", b"linkpath", b"GNU.sparse.size", b"mtime", b"hdrcharset", b"comment", b"")
        values = (named, str(len(data)).encode(), b"0", b"-1", b"1e9", b"9" * 30, b"a" * 100_000, b"\xff\xfe")
        records = [(draw.choice(keys), draw.choice(values)) for _ in range(draw.choice((1, 2, 8)))]
        body = _pax(records)
        if draw.random() < 0.3:
            body = mutate.bytes_of(draw, body, 2)
        before = _header(b"pax", _octal(len(body)), draw.choice((b"x", b"g"))) + _padded(body)
    elif pick == 1:
        body = _pax([(b"a", b"b")]) * draw.choice((100, 20_000))
        before = _header(b"pax", _octal(len(body)), b"x") + _padded(body)
    elif pick == 2:
        body = (named or b"x") * draw.choice((1, 3)) + b"\0"
        before = _header(b"././@LongLink", _octal(len(body)), draw.choice((b"L", b"K"))) + _padded(body)
        before *= draw.choice((1, 2, 30))
    return before + _header(named, size, kind, draw.choice((b"", b"", b"a/b", b"\xff"))) + _padded(data)


def write_tar(draw: random.Random, folder: Path) -> None:
    blocks = []
    for number in range(4):
        record = sound_record(number)
        parts = {
            "json": json.dumps(record if draw.random() < 0.8 else mutate.tree(draw, record, 2)),
            "png": base64.b64decode(record["png"]),
            "txt": record["txt"],
        }
        for extension, value in parts.items():
            data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            if draw.random() < 0.1:
                data = draw.choice(mutate.TEXTS).encode("utf-8", "surrogatepass")
            blocks.append(_member(draw, f"{number:04d}.{extension}", data, odd=draw.random() < 0.2))
    if draw.random() < 0.2:
        draw.shuffle(blocks)
    data = b"".join(blocks) + bytes(1024)
    if draw.random() < 0.4:
        data = mutate.bytes_of(draw, data, draw.choice((1, 4)), ends=draw.choice((0, 600)))
    (folder / "a.tar").write_bytes(data)
    sample, more = draw.choice(
        (
            ([{"image": ["webp", "png"]}, {"text": ["json.txt", "txt"]}], {}),
            ({"chat": "json.chat", "images": "png"}, {}),
            ({"chat": "json.messages", "images": "png", "place": "front"}, {"key": "json.id"}),
            ([{"text": "txt"}], {"key": "json.meta.id"}),
        )
    )
    shard_files.write_card(folder, "a.tar", sample, name="card", **more)


# ------------------------------------------------------------------------------------------------------------ parquet


def _column(draw: random.Random, rows: int) -> pa.Array:
    """A column of a type that a card does not expect, or of values that it does not."""
    pick = draw.randrange(9)
    if pick == 0:  # strings that are no UTF-8
        offsets = np.arange(rows + 1, dtype=np.int32) * 2
        return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(b"a\xff" * rows))
    if pick == 1:
        values = pa.array([draw.choice((2**62, -(2**62), 0)) for _ in range(rows)], pa.int64())
        return values.view(pa.timestamp(draw.choice(("ms", "us"))))
    if pick == 2:
        return pa.array([[{"bytes": b"x", "path": None}, None]] * rows)
    if pick == 3:
        return pa.array([bytes(draw.choice((0, 1000, 30_000_000)))] * rows)
    if pick == 4:
        return pa.array(["a"] * rows).dictionary_encode()
    if pick == 5:
        return pa.array([float("nan")] * rows, pa.float64())
    if pick == 6:
        return pa.array([2**62] * rows, pa.int64()).view(pa.duration("ms"))
    if pick == 7:
        return pa.nulls(rows)
    texts = [text for text in mutate.TEXTS if text.isascii()]
    return pa.array([draw.choice(texts) for _ in range(rows)])


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    picture = base64.b64decode(record["png"])
    whole = {"bytes": picture, "path": "a.png"}
    return record | {
        "png": whole,
        "images": [whole],
        "pictures": [None, whole, None],
        "matched": [{"at": 1, "data": picture}],
        "chat": json.dumps(record["chat"]),
        "messages": json.dumps(record["messages"]),
    }


def write_parquet(draw: random.Random, folder: Path) -> None:
    rows = 6
    read = write_card(draw, folder, "a.parquet", "parquet")
    table = pa.Table.from_pylist([_decoded(sound_record(number)) for number in range(rows)])
    for _ in range(draw.choice((0, 1, 1, 2))):
        name = draw.choice([name for name in table.column_names if name in read])
        table = table.set_column(table.column_names.index(name), name, _column(draw, rows))
    stream = io.BytesIO()
    pq.write_table(
        table,
        stream,
        row_group_size=draw.choice((1, 2, 6)),
        compression=draw.choice(("none", "snappy", "zstd", "gzip")),
        use_dictionary=draw.random() < 0.5,
        write_statistics=draw.random() < 0.5,
    )
    data = stream.getvalue()
    if draw.random() < 0.6:
        data = mutate.bytes_of(draw, data, draw.choice((1, 2, 6)), ends=draw.choice((0, 2000)))
    (folder / "a.parquet").write_bytes(data)
