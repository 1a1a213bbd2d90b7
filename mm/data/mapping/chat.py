"""A conversation in one field, its files in others."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mm.data.mapping.fields import all_files, checked, kind_of, look_up, missing, parsed
from mm.data.mapping.record import ROLES, Fields, RecordMapping
from mm.sample import MEDIA_PARTS, BrokenSample, Modality, Part, Role, Text

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

Turn = tuple[Role, list[str | Modality]]
"""Who speaks, and the words, with a modality where a file of it belongs."""


class Chat(RecordMapping):
    """A conversation in one field, its files in others.

    Args:
        field: path of the conversation: a list of turns in any of three forms, ``{from, value}`` (LLaVA),
            ``{role, content}`` (messages) or ``{user, assistant}`` (question and answer).
        files: for each modality the paths of its files, all that are present, in this order.
        front: put all files before the words of the first user turn, instead of where their markers are.
        base64: files are texts in base64.
    """

    choices = (1.0,)

    def __init__(
        self, field: str, files: Mapping[Modality, tuple[str, ...]], front: bool = False, base64: bool = False
    ) -> None:
        self._field = field
        self._files = dict(files)
        self._front = front
        self._base64 = base64
        markers = [] if front else [re.escape(marker) for marker, modality in MARKERS.items() if modality in files]
        self._markers = re.compile(f"({'|'.join(markers)})") if markers else None

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        turns: list[Turn] = [(role, self._pieces(content, role)) for role, content in _turns(fields, self._field)]
        files = {modality: all_files(fields, paths, self._base64) for modality, paths in self._files.items()}
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
            words = self._markers.split(checked(content, self._field)) if self._markers else [content]
            return [MARKERS[word] if number % 2 else word for number, word in enumerate(words) if word]
        if not isinstance(content, list):
            raise BrokenSample(f"broken chat: the content of a {role!r} turn is a {kind_of(content)}")
        return [_item(item, self._field) for item in content]


def _turns(fields: Fields, path: str) -> Iterator[tuple[Role, Any]]:
    conversation = parsed(look_up(fields, path), path)
    if conversation is None:
        raise BrokenSample(missing((path,), fields))
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
        return checked(item["text"], path)
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
