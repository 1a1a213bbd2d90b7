"""What the fields of unknown records hold, and a `sample:` that reads them.

records ──content, never names alone──▶ Field(kind, in how many) ──▶ proposal: parts or a chat
"""

from __future__ import annotations

import re
from base64 import b64decode
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mm import media
from mm.data.json_values import parse_json
from mm.data.mapping import PADDING, ROLES, parse_mapping, reading_a_record
from mm.data.mapping.fields import shown
from mm.data.mapping.words import is_blank
from mm.sample import MEDIA_PARTS, BrokenSample, Modality, encodable

KINDS = ("image", "speech", "point", "chat", "text", "label", "number", "JSON", "bytes", "other")
"""What a field may hold. A label is a text without spaces that no caption would be: a name, an address, a checksum."""

TEXT_NAMES = ("txt", "text", "caption", "captions", "recaption", "transcript", "transcription", "sentence", "content")
"""Last steps of the paths of fields that are more likely the words than others of their kind."""

_MEDIA = {modality.label: modality for modality in MEDIA_PARTS}
_CHAT_KEYS = ("images", "speech", "points")
_DEPTH = 3  # steps into JSON
_BASE64 = 64  # letters that a file in base64 has at least


@dataclass
class Field:
    """A field path: how many records hold each kind of value in it, and one value for people.

    characters: of all texts; spaces: texts with white space inside; texts: different ones
    encoded: files in base64
    """

    path: str
    kinds: Counter[str] = field(default_factory=Counter)
    example: str = ""
    characters: int = 0
    spaces: int = 0
    encoded: int = 0
    texts: set[str] = field(default_factory=set)

    @property
    def number(self) -> int:
        """Records that have it."""
        return self.kinds.total()

    @property
    def kind(self) -> str:
        """What it holds most often."""
        kind = self.kinds.most_common(1)[0][0]
        if kind == "text" and not self.spaces * 4 >= self.kinds["text"]:
            return "label"
        return kind


@dataclass(frozen=True)
class Proposal:
    """What was guessed.

    sample: the `sample:` of a card
    remarks: what was decided, and could have been decided otherwise
    """

    sample: Any
    remarks: tuple[str, ...]


def fields_of(records: Sequence[Mapping[str, Any]]) -> list[Field]:
    """The fields of some records, those in most records first."""
    found: dict[str, Field] = {}
    for record in records:
        for path, value in record.items():
            _look(found, path, value, _DEPTH)
    return sorted(found.values(), key=lambda one: (-one.number, one.path))


def propose(fields: Sequence[Field], records: Sequence[Mapping[str, Any]]) -> Proposal | None:
    """A `sample:` for records with these fields; None where nothing in them can be learned."""
    by_kind: dict[str, list[Field]] = defaultdict(list)
    for one in fields:
        by_kind[one.kind].append(one)
    remarks: list[str] = []
    if page := _page(records):
        return Proposal(
            page, ("two lists of equal length, one with words where the other has none, are read as pages",)
        )
    encoded = any(one.encoded for one in fields)
    if by_kind["chat"]:
        every = {kind: sorted((one.path for one in by_kind[kind]), key=_counted) for kind in _MEDIA if by_kind[kind]}
        return _chat(by_kind["chat"], every, encoded, records, remarks)
    texts = by_kind["text"] or [one for one in by_kind["label"] if _rank(one) < len(TEXT_NAMES)]
    if not texts:
        return None
    most = max(one.number for one in texts)
    texts.sort(key=lambda one: (one.number * 2 < most, _rank(one), -one.characters / one.number * len(one.texts)))
    files = {kind: paths for kind in _MEDIA if (paths := _files(kind, by_kind[kind], records, remarks))}
    if len(texts) > 1:
        remarks.append(f"words could also be {', '.join(one.path for one in texts[1:6])}")
    parts: list[Any] = []
    for kind, paths in files.items():
        source = paths if len(paths) > 1 else paths[0]
        parts.append({kind: {"from": source, "encoding": "base64"} if encoded else source})
    return Proposal([*parts, {"text": texts[0].path}], tuple(remarks))


def _rank(one: Field) -> int:
    """How likely a field holds the words by its name: place in `TEXT_NAMES`, their number if it is not among them."""
    steps = [step for step in one.path.lower().split(".") if not step.isdecimal()]
    return TEXT_NAMES.index(steps[-1]) if steps and steps[-1] in TEXT_NAMES else len(TEXT_NAMES)


def _counted(path: str) -> list[tuple[int, int, str]]:
    """Order of the files of a chat: ``2.png`` comes before ``10.png``, as it does for who numbered them."""
    pieces = (piece for piece in re.split(r"(\d+)", path) if piece)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def _files(kind: str, fields: Sequence[Field], records: Sequence[Mapping[str, Any]], remarks: list[str]) -> list[str]:
    """Paths of the files of a modality: the most frequent field, and those that stand in where it is missing."""
    chosen: list[str] = []
    for one in fields:
        together = any(chosen and one.path in record and any(path in record for path in chosen) for record in records)
        if together:
            remarks.append(f"{one.path} holds further {kind} files, which are not read")
        else:
            chosen.append(one.path)
    return chosen


def _page(records: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Two lists side by side, of which one holds words and the other pictures, in most records."""
    votes: Counter[tuple[str, str]] = Counter()
    for record in records:
        lists = {path: value for path, value in _lists(record) if not all(value) or len(value) == 1}
        for texts, words in lists.items():
            for images, pictures in lists.items():
                if texts != images and _side_by_side(words, pictures):
                    votes[texts, images] += 1
    if not votes or votes.most_common(1)[0][1] * 2 < len(records):
        return None
    texts, images = votes.most_common(1)[0][0]
    return {"texts": texts, "images": images}


def _lists(record: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for name, value in record.items():
        parsed = _parsed(value)
        inside = {f"{name}.{key}": below for key, below in parsed.items()} if isinstance(parsed, dict) else {}
        yield from ((path, one) for path, one in {name: parsed, **inside}.items() if isinstance(one, list) and one)


def _side_by_side(words: list[Any], pictures: list[Any]) -> bool:
    if len(words) != len(pictures) or not any(isinstance(word, str) for word in words):
        return False
    if not all(word is None or isinstance(word, str) for word in words):
        return False
    return all((not word) != (not picture) for word, picture in zip(words, pictures, strict=True))


def _chat(
    chats: Sequence[Field],
    files: Mapping[str, list[str]],
    encoded: bool,
    records: Sequence[Mapping[str, Any]],
    remarks: list[str],
) -> Proposal:
    if len(chats) > 1:
        remarks.append(f"chats could also be {', '.join(one.path for one in chats[1:6])}")
    sample: dict[str, Any] = {"chat": chats[0].path}
    for key, (kind, _) in zip(_CHAT_KEYS, _MEDIA.items(), strict=True):
        if kind in files:
            sample[key] = files[kind] if len(files[kind]) > 1 else files[kind][0]
    if files and encoded:
        sample["encoding"] = "base64"
    if files:
        usable = {placed: _usable(sample | dict(placed.keys), records) for placed in _PLACED}
        if usable[_AT_MARKERS]:  # where some chats have markers, and others none
            usable.pop(_IN_FRONT)
        placed = max(usable, key=lambda placed: usable[placed])
        sample |= placed.keys
        remarks += [placed.remark] if placed.remark else []
    return Proposal(sample, tuple(remarks))


class _Placed(NamedTuple):
    """Keys of a chat that say where files belong, and what they mean."""

    keys: tuple[tuple[str, str], ...]
    remark: str = ""


_AT_MARKERS = _Placed(())
_IN_FRONT = _Placed((("place", "front"),), "no chat says where its files belong: they are put before the first words")
_PLACED = (
    _AT_MARKERS,
    _Placed((("markers", "all"),), "markers in answers are read too: with them there are as many markers as files"),
    _IN_FRONT,
    _Placed((("place", "either"),), "chats that do not say where their files belong have them before the first words"),
)
"""Options of a chat with files, in order: the first by which most records are samples is proposed."""


def _usable(sample: Any, records: Sequence[Mapping[str, Any]]) -> int:
    """How many records are samples by this mapping."""
    mapping, usable = parse_mapping(sample), 0
    for record in records:
        with suppress(BrokenSample), reading_a_record():
            mapping.parts(record, 0)
            usable += 1
    return usable


# -------------------------------------------------------------------------------------------------------- what it is


def _look(found: dict[str, Field], path: str, value: Any, depth: int) -> None:
    """Counts a value, and what is inside it."""
    if value is None or value in (b"", "", [], {}) or path != encodable(path):
        return  # nothing, or a name that no card can hold
    parsed = _parsed(value)
    inside = parsed if isinstance(parsed, dict | list) else None
    kind = _kind(value, inside)
    one = found.setdefault(path, Field(path))
    one.kinds[kind] += 1
    one.encoded += kind in _MEDIA and _first(value) is not None and isinstance(_first(value), str)
    one.example = one.example or _example(value, kind)
    if kind == "text":  # also of labels, which only the sum over all records tells apart
        text = (value.decode() if isinstance(value, bytes) else value).strip(PADDING)
        one.characters += len(text)
        one.spaces += len(text.split()) > 1
        one.texts.add(text[:80])
    if kind == "JSON" and depth:
        for step, below in _steps(inside):
            _look(found, f"{path}.{step}", below, depth - 1)


def _steps(inside: Any) -> Iterator[tuple[str, Any]]:
    """Keys of a mapping with what they hold; of a list the first item, which stands for all."""
    if isinstance(inside, dict):
        yield from ((key, below) for key, below in inside.items() if isinstance(key, str) and key)
    elif inside:
        yield "0", inside[0]


def _kind(value: Any, inside: Any) -> str:
    for label, modality in _MEDIA.items():
        if (data := _bytes_of(value)) and _is(modality, data):
            return label
    if _is_chat(inside):
        return "chat"
    if inside is not None:
        return "JSON"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes):
        try:
            words = value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes"
        return "other" if is_blank(words) else "text"
    return "other"


def _bytes_of(value: Any) -> bytes | None:
    """The file in a value: bytes, Hugging Face's ``{bytes, path}``, text in base64, or the first of a list of these."""
    value = _first(value)
    if isinstance(value, str) and len(value) >= _BASE64:
        text = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return b64decode(text, validate=True)
        except ValueError:
            return None
    return value if isinstance(value, bytes) else None


def _first(value: Any) -> Any:
    if isinstance(value, list):
        value = next((one for one in value if one is not None), None)
    return value.get("bytes") if isinstance(value, dict) else value


def _is(modality: Modality, data: bytes) -> bool:
    try:
        with reading_a_record():
            media.facts(MEDIA_PARTS[modality](data))
    except BrokenSample:
        return False
    return True


def _is_chat(value: Any) -> bool:
    """Whether it is a list of turns in a form that a card reads."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    speakers = [turn.get("from", turn.get("role")) for turn in value]
    if all(isinstance(speaker, str) and speaker in ROLES for speaker in speakers):
        return True
    return all(isinstance(turn.get("user"), str) and isinstance(turn.get("assistant"), str) for turn in value)


def _parsed(value: Any) -> Any:
    """JSON behind bytes or text that could be an object or a list; anything else as it is."""
    if not isinstance(value, bytes | str):
        return value
    start = value.strip(PADDING) if isinstance(value, str) else value.removeprefix(BOM_UTF8)
    if start.lstrip()[:1] not in (b"{", b"[", "{", "["):
        return value
    try:
        return parse_json(start)
    except (ValueError, RecursionError):
        return value


def _example(value: Any, kind: str) -> str:
    """A value in a line."""
    if kind in _MEDIA:
        data = _bytes_of(value)
        assert data is not None
        return f"{tuple(media.facts(MEDIA_PARTS[_MEDIA[kind]](data)))}, {len(data):,} bytes"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes" if kind == "bytes" else value[:200].decode("utf-8", "replace")
    return value[:200] if isinstance(value, str) else shown(value)
