"""The kinds of input: for each, how a mutated one is written and what a user would run on it."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml
from PIL import Image as PillowImage

from mm import cli, media
from mm.data.card import Card
from mm.data.index import index_card
from mm.evaluate.suite import SuiteError, read_suite
from mm.sample import MEDIA_PARTS, BrokenSample, MediaPart, Modality
from tests.fuzz import mutate
from tests.shard_files import cloud, jpeg, write_card
from tests.small_world import FORMS, write_recipe, write_source, write_tokenizer


class Kind(NamedTuple):
    """One kind of input.

    write: writes a mutated input into an empty folder
    use: runs on that folder what a user would; raises only where the suite did not say what is wrong
    """

    write: Callable[[random.Random, Path], None]
    use: Callable[[random.Random, Path], None]


class Unprintable(AssertionError):
    """Control characters of the data in what a command printed."""


def command(*arguments: str) -> None:
    """Run ``mm`` in this process with its output held to UTF-8, and free of control characters."""
    before = sys.argv, sys.stdout, sys.stderr
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding="utf-8", errors="strict", newline="\n", write_through=True)
    sys.argv, sys.stdout, sys.stderr = ["mm", *arguments], output, output
    try:
        cli.main()
    except SystemExit as end:
        if end.code not in (None, 0, 1, 2):
            raise AssertionError(f"mm {arguments[0]} ended with {end.code!r}") from end
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    printed = written.getvalue().decode()
    if escapes := sorted({letter for letter in printed if letter in "\x00\x07\x08\x1b\x9b\r\u202e"}):
        raise Unprintable(f"mm {arguments[0]} printed {escapes!r}: {printed[:2000]!r}")


def _use_card(draw: random.Random, folder: Path) -> None:
    """What is done with a card and its shards: index, read every row as training does, and look."""
    card = str(folder / "card.yaml")
    command("index", card, "--folder", str(folder / "index"))
    try:
        index = index_card(Card.load(card), "train", folder / "index", progress=False)
    except Exception as error:
        if not cli._speaks_for_itself(error):
            raise
        return
    index.summary()
    for row in range(index.rows):
        for choice in range(len(index.card.choices)):
            try:
                for part in index.sample(row, choice).media:
                    media.decode(part)
            except BrokenSample:
                continue
    pick = draw.randrange(4)
    if pick == 0 and index.rows:
        command("data", "show", card, "0", "--folder", str(folder / "index"))
    elif pick == 1:
        command("data", "check", card, "--processes", "0")
    elif pick == 2:
        command("doctor", *Card.load(card).shards("train"), "--seconds", "5")


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


def _record(number: int) -> dict[str, Any]:
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


def _write_card(draw: random.Random, folder: Path, shard: str, format: str) -> set[str]:
    """A card of some form; returns the fields that it reads, on which changes tell more than on others."""
    sample, more = draw.choice(FORMS_OF_RECORDS)
    text = json.dumps(sample)
    if format == "parquet":  # which holds bytes
        text = text.replace(', "encoding": "base64"', "")
    card = write_card(folder, shard, json.loads(text), format, name="card", **more)
    return {path.partition(".")[0] for path in Card.load(card).mapping.paths()} | {str(more.get("key", "txt"))[:4]}


# ---------------------------------------------------------------------------------------------------------- JSON lines


def _write_jsonl(draw: random.Random, folder: Path) -> None:
    read = _write_card(draw, folder, "a.jsonl", "jsonl")
    records: list[Any] = [{name: one for name, one in _record(n).items() if name in read} for n in range(4)]
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


# ----------------------------------------------------------------------------------------------------------------- tar


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


def _write_tar(draw: random.Random, folder: Path) -> None:
    blocks = []
    for number in range(4):
        record = _record(number)
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
    write_card(folder, "a.tar", sample, name="card", **more)


# ------------------------------------------------------------------------------------------------------------- parquet


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


def _write_parquet(draw: random.Random, folder: Path) -> None:
    rows = 6
    read = _write_card(draw, folder, "a.parquet", "parquet")
    table = pa.Table.from_pylist([_decoded(_record(number)) for number in range(rows)])
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


# --------------------------------------------------------------------------------------------------------------- media


def _pictures(draw: random.Random) -> bytes:
    format = draw.choice(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    mode = draw.choice(("RGB", "L", "P", "RGBA", "1", "I;16") if format in ("PNG", "TIFF") else ("RGB", "L"))
    sides = (24, 9)
    picture = PillowImage.frombytes("RGB", sides, draw.randbytes(24 * 9 * 3))
    picture = PillowImage.new("I;16", sides, 700) if mode == "I;16" else picture.convert(mode)
    stream = io.BytesIO()
    more: dict[str, Any] = {}
    if format in ("GIF", "WEBP", "TIFF", "PNG") and draw.random() < 0.3:
        more = {"save_all": True, "append_images": [picture] * 3}
    if format in ("JPEG", "PNG", "WEBP") and draw.random() < 0.4:
        exif = PillowImage.Exif()
        exif[0x0112] = draw.choice((0, 3, 6, 8, 9, 65535))
        more["exif"] = exif
    picture.save(stream, format, **more)
    return stream.getvalue()


def _recordings(draw: random.Random) -> bytes:
    format, subtype = draw.choice(
        (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"))
        + (("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"))
    )
    stream = io.BytesIO()
    samples = np.sin(np.arange(draw.choice((1, 800, 5000))))[:, None].repeat(draw.choice((1, 2)), 1) * 0.3
    soundfile.write(stream, samples, draw.choice((8000, 16_000, 44_100)), format=format, subtype=subtype)
    return stream.getvalue()


def _clouds(draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return cloud(draw.choice((1, 7)), draw.choice((3, 6)))
    header = {
        "descr": draw.choice(("<f4", ">f8", "<f2", "|O", "<c8", "<i8", "|b1", "<U3", "[('a', '<f4')]", "<M8[s]", 5)),
        "fortran_order": draw.choice((False, True, 1, None)),
        "shape": draw.choice(((7, 3), (2**40, 3), (-1, 3), (True, 3), (3,), (), (2**63, 6), (7, 3.0), "7", [7, 3])),
    }
    text = (repr(header) if draw.random() < 0.8 else "[" * draw.choice((50, 5000))).encode() + b"\n"
    version = draw.choice((1, 2, 3))
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(7 * 3 * 4)


_MEDIA = {Modality.IMAGE: _pictures, Modality.SPEECH: _recordings, Modality.POINT: _clouds}


def _write_media(draw: random.Random, folder: Path) -> None:
    modality = draw.choice((Modality.IMAGE, Modality.IMAGE, Modality.SPEECH, Modality.SPEECH, Modality.POINT))
    data = _MEDIA[modality](draw)
    data = mutate.bytes_of(draw, data, draw.choice((1, 1, 2, 6)), ends=draw.choice((48, 48, 300)))
    (folder / f"a.{modality.label}").write_bytes(data)


def _use_media(draw: random.Random, folder: Path) -> None:
    """Facts and decoding agree, or both are refused as broken."""
    (path,) = folder.glob("a.*")
    part: MediaPart = MEDIA_PARTS[{one.label: one for one in Modality}[path.suffix[1:]]](path.read_bytes())
    try:
        facts = media.facts(part)
    except BrokenSample:
        facts = None
    try:
        item = media.decode(part)
    except BrokenSample:
        return
    assert facts is not None, "decoded, although its header was refused"
    assert all(0 <= fact < 2**31 for fact in facts), f"facts {facts} do not fit the index"
    assert tuple(media.measure(item)) == tuple(facts), f"decodes to {media.measure(item)}, promised were {facts}"
    if isinstance(item, PillowImage.Image):
        media.perceptual_hash(item)


# ------------------------------------------------------------------------------------------------------------- suites


def _write_tsv(draw: random.Random, folder: Path) -> None:
    columns = ["index", "image", "question", "A", "B", "C", "D", "answer", "hint", "category", "l2-category", "split"]
    rows = [
        [str(n), base64.b64encode(jpeg(8 + n, 9)).decode(), f"What {n}?", "cat", "dog", "hat", "mat", "ABCD"[n % 4]]
        + ["", "animals", "things", "dev"]
        for n in range(4)
    ]
    changed = [columns, *rows]
    for _ in range(draw.choice((1, 1, 2, 4))):
        row = draw.choice(changed)
        pick = draw.randrange(6)
        if pick < 3 and row:
            row[draw.randrange(len(row))] = str(mutate.value(draw))
        elif pick == 3 and row:
            del row[draw.randrange(len(row))]
        elif pick == 4 and row:
            row.insert(draw.randrange(len(row)), draw.choice(row))
        else:
            changed.insert(draw.randrange(len(changed) + 1), list(draw.choice(changed)))
    text = draw.choice(("\n", "\r\n", "\n", "\r")).join("\t".join(row) for row in changed)
    data = text.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    if draw.random() < 0.4:
        data = mutate.bytes_of(draw, data, draw.choice((1, 5)), ends=300)
    (folder / "a.tsv").write_bytes(data)
    if draw.random() < 0.3:
        settings = {"score": "sum", "prompt": "{question}", "seed": 3, "made": {"by": "a test"}}
        (folder / "a.suite.yaml").write_text(_as_yaml(draw, mutate.tree(draw, settings)), encoding="utf-8")


def _use_tsv(draw: random.Random, folder: Path) -> None:
    try:
        suite = read_suite(folder / "a.tsv")
        assert suite.fingerprint
        assert [question.letter_prompt for question in suite.questions]
    except SuiteError:
        return
    except Exception as error:
        if not cli._speaks_for_itself(error):
            raise


# ------------------------------------------------------------------------------------------------------ cards, recipes


def _as_yaml(draw: random.Random, tree: Any) -> str:
    """The tree in YAML, at times with aliases, tags, repeated keys, a BOM, or changed bytes."""
    try:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw.random() < 0.5)
    except (RecursionError, UnicodeEncodeError):
        text = json.dumps(tree)
    text = text.encode("utf-8", "replace").decode()
    pick = draw.randrange(12)
    if pick == 0:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
        text = bomb + text
    elif pick == 1:
        text = text.replace(": ", f": {draw.choice(('!!python/object/apply:os.getcwd ', '!!binary ', '!x ', '&a '))}", 1)
    elif pick == 2:
        text += text
    elif pick == 3:
        text = "\ufeff" + text
    elif pick == 4:
        text = mutate.bytes_of(draw, text.encode(), 3).decode("utf-8", "replace")
    elif pick == 5:
        text += "more: " + "[" * draw.choice((100, 3000)) + "\n"
    elif pick == 6:
        text += "more: " + "{a: " * draw.choice((100, 3000)) + "\n"
    return text


def _write_mutated_card(draw: random.Random, folder: Path) -> None:
    source = draw.choice(list(FORMS))
    path = write_source(folder, source, rows=2, shards=1)
    card = yaml.safe_load(path.read_text())
    path.unlink()
    card |= {"key": "txt"} if draw.random() < 0.2 else {}
    mutated = mutate.tree(draw, card, draw.choice((1, 1, 2, 4)))
    (folder / "card.yaml").write_text(_as_yaml(draw, mutated), encoding="utf-8")


def _use_mutated_card(draw: random.Random, folder: Path) -> None:
    card = str(folder / "card.yaml")
    command("index", card, "--folder", str(folder / "index"))
    command("data", "check", card, "--processes", "0")


def _write_recipe(draw: random.Random, folder: Path) -> None:
    """A recipe on captions and text, with one encoder, mutated."""
    world = folder.parent / "world"
    if not world.exists():
        (world / "tokenizer").mkdir(parents=True)
        write_tokenizer(world / "tokenizer")
        for source in ("pairs", "text"):
            write_source(world, source, rows=8)
    cards = {"pairs": world / "pairs.yaml", "text": world / "text.yaml", "held_out": world / "text.yaml"}
    path = write_recipe(folder, cards, world / "tokenizer", sources=("pairs", "text"))
    recipe = yaml.safe_load(path.read_text())
    del recipe["model"]["encoders"]["speech"], recipe["model"]["encoders"]["point"]
    mutated = mutate.tree(draw, recipe, draw.choice((1, 1, 2, 3)))
    path.write_text(_as_yaml(draw, mutated), encoding="utf-8")


def _use_recipe(draw: random.Random, folder: Path) -> None:
    recipe = str(folder / "recipe.yaml")
    command("plan", recipe)
    if draw.random() < 0.3:
        command("estimate", recipe, "--gpus", "2")


KINDS: dict[str, Kind] = {
    "tar": Kind(_write_tar, _use_card),
    "parquet": Kind(_write_parquet, _use_card),
    "jsonl": Kind(_write_jsonl, _use_card),
    "media": Kind(_write_media, _use_media),
    "tsv": Kind(_write_tsv, _use_tsv),
    "card": Kind(_write_mutated_card, _use_mutated_card),
    "recipe": Kind(_write_recipe, _use_recipe),
}
