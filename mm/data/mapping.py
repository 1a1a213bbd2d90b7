"""How a record becomes a sample: the ``sample:`` of a data card.

    Parts   an ordered list of parts, each read from a field      caption pairs, transcripts, questions in columns
    Chat    one field holds a conversation with media markers     LLaVA turns, message lists, question–answer lists

A field is named by a path: ``txt``; ``json.recaption``, a key of the JSON in ``json``; ``captions.0``, the first of a
list column. Nothing in a record is executed, opened as a path or fetched as an address.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mm.sample import MEDIA_PARTS, BrokenSample, Modality, Part, Role, Text

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

CHAT_FILES = {"images": Modality.IMAGE, "speech": Modality.SPEECH, "points": Modality.POINT}
"""Keys of a chat mapping that name the fields with its files."""

MARKERS = {
    "<image>": Modality.IMAGE,
    "<speech>": Modality.SPEECH,
    "<audio>": Modality.SPEECH,
    "<point>": Modality.POINT,
}
"""What stands for a file in the words of a conversation, where its mapping names files of that modality."""

CONTENT_TYPES = {
    "image": Modality.IMAGE,
    "image_url": Modality.IMAGE,
    "audio": Modality.SPEECH,
    "input_audio": Modality.SPEECH,
    "speech": Modality.SPEECH,
    "point": Modality.POINT,
}
"""Types of the items of a message's content list; each stands for the next file. Addresses in them are ignored."""

Fields = Mapping[str, Any]
Turn = tuple[Role, list[str | Modality]]
"""Who speaks, and the words, with a modality where a file of it belongs."""


class MappingError(ValueError):
    """A ``sample:`` that does not follow the form; the message names the key and what is allowed."""


class RecordMapping(ABC):
    """Record to parts. `choices` are the probabilities of the alternative texts, at least one."""

    choices: tuple[float, ...]

    @abstractmethod
    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        """The parts of a sample under one of the choices.

        Raises:
            BrokenSample: the record lacks something, or holds what cannot be used.
        """

    @abstractmethod
    def paths(self) -> Iterator[str]:
        """The field paths that are read."""


# -------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class Alternative:
    """Fields of which the first that is present counts, and the probability of this alternative."""

    fields: tuple[str, ...]
    p: float = 1.0


@dataclass(frozen=True, slots=True)
class TextPart:
    alternatives: tuple[Alternative, ...]
    loss: bool = True
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class MediaFiles:
    modality: Modality
    fields: tuple[str, ...]
    role: Role | None = None


class Parts(RecordMapping):
    """Parts in the order of the card. A choice picks one alternative of every text; the last text varies fastest."""

    def __init__(self, parts: tuple[TextPart | MediaFiles, ...]) -> None:
        self._parts = parts
        alternatives = [part.alternatives for part in parts if isinstance(part, TextPart)]
        self._combinations = list(itertools.product(*alternatives))
        self.choices = tuple(math.prod(one.p for one in combination) for combination in self._combinations)

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        picked = iter(self._combinations[choice])
        parts: list[Part] = []
        for part in self._parts:
            if isinstance(part, TextPart):
                parts.append(Text(_first_words(fields, next(picked).fields), part.loss, part.role))
            else:
                kind = MEDIA_PARTS[part.modality]
                parts += [kind(data, part.role) for data in _first_files(fields, part.fields)]
        return tuple(parts)

    def paths(self) -> Iterator[str]:
        for part in self._parts:
            if isinstance(part, TextPart):
                yield from itertools.chain.from_iterable(one.fields for one in part.alternatives)
            else:
                yield from part.fields


# --------------------------------------------------------------------------------------------------------------- chat


class Chat(RecordMapping):
    """A conversation in one field, its files in others.

    Args:
        field: path of the conversation: a list of turns in any of three forms, ``{from, value}`` (LLaVA),
            ``{role, content}`` (messages) or ``{user, assistant}`` (question and answer).
        files: for each modality the paths of its files, all that are present, in this order.
        front: put all files before the words of the first user turn, instead of where their markers are.
    """

    choices = (1.0,)

    def __init__(self, field: str, files: Mapping[Modality, tuple[str, ...]], front: bool = False) -> None:
        self._field = field
        self._files = dict(files)
        self._front = front
        markers = [] if front else [re.escape(marker) for marker, modality in MARKERS.items() if modality in files]
        self._markers = re.compile(f"({'|'.join(markers)})") if markers else None

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        turns: list[Turn] = [(role, self._pieces(content, role)) for role, content in _turns(fields, self._field)]
        files = {modality: _all_files(fields, paths) for modality, paths in self._files.items()}
        if self._front:
            _put_in_front(turns, files)
        _check_turns(turns)
        _check_counts(turns, files)
        following = {modality: iter(found) for modality, found in files.items()}
        return tuple(
            Text(piece, role == "assistant", role)
            if isinstance(piece, str)
            else MEDIA_PARTS[piece](next(following[piece]), role)
            for role, pieces in turns
            for piece in pieces
        )

    def paths(self) -> Iterator[str]:
        yield self._field
        yield from itertools.chain.from_iterable(self._files.values())

    def _pieces(self, content: Any, role: Role) -> list[str | Modality]:
        if isinstance(content, str):
            words = self._markers.split(_checked(content, self._field)) if self._markers else [content]
            return [MARKERS[word] if number % 2 else word for number, word in enumerate(words) if word]
        if not isinstance(content, list):
            raise BrokenSample(f"broken chat: the content of a {role!r} turn is a {_kind(content)}")
        return [_item(item, self._field) for item in content]


def _turns(fields: Fields, path: str) -> Iterator[tuple[Role, Any]]:
    conversation = _parsed(look_up(fields, path), path)
    if conversation is None:
        raise BrokenSample(_missing((path,), fields))
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise BrokenSample(f"broken chat: {path!r} is not a list of turns")
    for turn in conversation:
        if turn.get("from") is not None:
            yield _role(turn["from"]), turn.get("value")
        elif turn.get("role") is not None:
            yield _role(turn["role"]), turn.get("content")
        elif turn.get("user") is not None and turn.get("assistant") is not None:
            yield "user", turn["user"]
            yield "assistant", turn["assistant"]
        else:
            raise BrokenSample(f"broken chat: a turn with keys {sorted(turn)} says not who speaks")


def _role(name: Any) -> Role:
    if not isinstance(name, str) or name not in ROLES:
        raise BrokenSample(f"unknown role: {name!r}, known are {', '.join(ROLES)}")
    return ROLES[name]


def _item(item: Any, path: str) -> str | Modality:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return _checked(item["text"], path)
    if isinstance(kind, str) and kind in CONTENT_TYPES:
        return CONTENT_TYPES[kind]
    raise BrokenSample(f"broken chat: content of type {kind!r}, known are text, {', '.join(CONTENT_TYPES)}")


def _put_in_front(turns: list[Turn], files: Mapping[Modality, list[bytes]]) -> None:
    front = [modality for modality, found in files.items() for _ in found]
    for number, (role, pieces) in enumerate(turns):
        if role == "user":
            turns[number] = (role, [*front, *pieces])
            return


def _check_turns(turns: list[Turn]) -> None:
    for role, pieces in turns:
        if not any(not isinstance(piece, str) or piece.strip() for piece in pieces):
            raise BrokenSample(f"broken chat: an empty {role!r} turn")
    for (role, _), (following, _) in itertools.pairwise(turns):
        if role == following:
            raise BrokenSample(f"broken chat: two {role!r} turns in a row")
    if not any(role == "assistant" and any(isinstance(piece, str) for piece in pieces) for role, pieces in turns):
        raise BrokenSample("broken chat: no words of the assistant, nothing to learn")


def _check_counts(turns: list[Turn], files: Mapping[Modality, list[bytes]]) -> None:
    markers = Counter(piece for _, pieces in turns for piece in pieces if not isinstance(piece, str))
    for modality in {*markers, *files}:
        given = len(files.get(modality, []))
        if markers[modality] != given:
            raise BrokenSample(
                f"{modality.label} markers and files differ: {markers[modality]} markers, {given} files in the record"
            )


# ------------------------------------------------------------------------------------------------------------- fields


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
        value = _parsed(value, head)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _parsed(value: Any, path: str) -> Any:
    """JSON behind bytes or text; anything else as it is."""
    if not isinstance(value, bytes | str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(f"broken JSON: {path!r}: {error}") from error


def _first_words(fields: Fields, paths: tuple[str, ...]) -> str:
    """Text of the first field that holds any, without white space around it."""
    present = ""
    for path in paths:
        value = look_up(fields, path)
        if value is None:
            continue
        if words := _words(value, path).strip():
            return words
        present = path
    raise BrokenSample(f"empty text: {present!r}" if present else _missing(paths, fields))


def _words(value: Any, path: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenSample(f"text is not UTF-8: {path!r}: {error.reason} at byte {error.start}") from error
    if isinstance(value, str):
        return _checked(value, path)
    raise BrokenSample(f"not a text: {path!r} holds a {_kind(value)}")


def _checked(words: str, path: str) -> str:
    """The words, if they can be encoded: JSON may hold half a surrogate pair, on which a tokenizer would fail later."""
    try:
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenSample(f"text is not UTF-8: {path!r}: {error.reason} at character {error.start}") from error
    return words


def _first_files(fields: Fields, paths: tuple[str, ...]) -> list[bytes]:
    """Files of the first field that holds any."""
    for path in paths:
        if files := _files(look_up(fields, path), path):
            return files
    raise BrokenSample(_missing(paths, fields))


def _all_files(fields: Fields, paths: tuple[str, ...]) -> list[bytes]:
    return [data for path in paths for data in _files(look_up(fields, path), path)]


def _files(value: Any, path: str) -> list[bytes]:
    """Encoded files of a field: bytes, Hugging Face's ``{bytes, path}``, or a list of either."""
    if value is None:
        return []
    if isinstance(value, list):
        return [data for one in value for data in _files(one, path)]
    if isinstance(value, dict):
        if value.get("bytes") is None:
            raise BrokenSample(f"no file: {path!r} holds a path or an address instead of bytes")
        value = value["bytes"]
    if not isinstance(value, bytes):
        raise BrokenSample(f"no file: {path!r} holds a {_kind(value)}")
    if not value:
        raise BrokenSample(f"empty file: {path!r}")
    return [value]


def _missing(paths: tuple[str, ...], fields: Fields) -> str:
    return f"missing field: {' or '.join(map(repr, paths))}; the record has {', '.join(sorted(fields)) or 'none'}"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# ------------------------------------------------------------------------------------------------------------ parsing


def parse_mapping(spec: Any) -> RecordMapping:
    """The mapping that the ``sample:`` of a card describes, see ``data_cards/README.md``.

    Raises:
        MappingError: an unknown key or a value of the wrong kind; names it and what is allowed.
    """
    if isinstance(spec, list) and spec:
        parts = tuple(_parse_part(part, f"sample[{number}]") for number, part in enumerate(spec))
        if len({part.role is None for part in parts}) > 1:
            raise MappingError("sample: give every part a `role`, which makes the sample a chat, or none of them")
        return Parts(parts)
    if isinstance(spec, dict) and "chat" in spec:
        return _parse_chat(spec)
    raise MappingError("sample: expected a list of parts, or a mapping with `chat`")


def _parse_part(spec: Any, where: str) -> TextPart | MediaFiles:
    kinds = {modality.label: modality for modality in Modality}
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in kinds:
        raise MappingError(
            f"{where}: expected one part such as `text: txt`, of the kinds {', '.join(kinds)}; got {spec!r}"
        )
    kind, source = next(iter(spec.items()))
    modality, where = kinds[kind], f"{where}.{kind}"
    options = source if isinstance(source, dict) else {"from": source}
    check_keys(options, ("from",), ("role", "loss") if modality == Modality.TEXT else ("role",), where)
    role = options.get("role")
    if role is not None and (not isinstance(role, str) or role not in ROLES):
        raise MappingError(f"{where}.role: {role!r}, allowed are {', '.join(ROLES)}")
    role = None if role is None else ROLES[role]
    if modality != Modality.TEXT:
        return MediaFiles(modality, _parse_paths(options["from"], where), role)
    loss = options.get("loss", role in (None, "assistant"))
    if not isinstance(loss, bool):
        raise MappingError(f"{where}.loss: {loss!r}, expected true or false")
    return TextPart(_parse_alternatives(options["from"], where), loss, role)


def _parse_alternatives(spec: Any, where: str) -> tuple[Alternative, ...]:
    if not isinstance(spec, list) or not all(isinstance(one, dict) for one in spec):
        return (Alternative(_parse_paths(spec, where)),)
    for number, one in enumerate(spec):
        check_keys(one, ("from", "p"), (), f"{where}[{number}]")
        if not isinstance(one["p"], int | float) or not 0 < one["p"] <= 1:
            raise MappingError(f"{where}[{number}].p: {one['p']!r}, expected a probability")
    if abs((total := sum(one["p"] for one in spec)) - 1) > 1e-6:
        raise MappingError(f"{where}: the probabilities `p` add up to {total:g}, expected 1")
    return tuple(Alternative(_parse_paths(one["from"], f"{where}[{n}]"), float(one["p"])) for n, one in enumerate(spec))


def _parse_chat(spec: dict[str, Any]) -> Chat:
    check_keys(spec, ("chat",), ("place", *CHAT_FILES), "sample")
    if not isinstance(spec["chat"], str):
        raise MappingError(f"sample.chat: {spec['chat']!r}, expected the path of the field with the conversation")
    place = spec.get("place", "markers")
    if place not in ("markers", "front"):
        raise MappingError(f"sample.place: {place!r}, allowed are markers, front")
    files = {modality: _parse_paths(spec[key], f"sample.{key}") for key, modality in CHAT_FILES.items() if key in spec}
    return Chat(spec["chat"], files, place == "front")


def _parse_paths(spec: Any, where: str) -> tuple[str, ...]:
    paths = [spec] if isinstance(spec, str) else spec
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise MappingError(f"{where}: {spec!r}, expected the name of a field or a list of names")
    return tuple(paths)


def check_keys(spec: Any, required: Collection[str], optional: Collection[str], where: str) -> None:
    """Raises `MappingError` where a mapping of the card has unknown keys, lacks some, or is none."""
    allowed = ", ".join([*required, *optional])
    if not isinstance(spec, dict):
        raise MappingError(f"{where}: {spec!r}, expected a mapping with the keys {allowed}")
    for key in spec:
        if key not in required and key not in optional:
            raise MappingError(f"{where}: unknown key {key!r}, allowed are {allowed}")
    for key in required:
        if key not in spec:
            raise MappingError(f"{where}: missing key {key!r}; the keys are {allowed}")
