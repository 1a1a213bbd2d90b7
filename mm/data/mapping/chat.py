"""A conversation in one field, its files in others."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mm.data.mapping.fields import kind_of, look_up, missing, parsed, shown
from mm.data.mapping.files import all_files
from mm.data.mapping.record import ROLES, Fields, RecordMapping
from mm.data.mapping.words import is_blank, words_of
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

PLACES = ("markers", "front", "either")
"""Where files belong: at their markers; before all words; at their markers in chats that have any, else before all."""

MARKED = ("user", "all")
"""Turns in whose words markers are read: those of user and system, or all. In others they are words."""

_APART = re.compile(r"^(\r?\n| )")

Turn = tuple[Role, list[str | Modality]]
"""Who speaks, and the words, with a modality where a file of it belongs."""


class Chat(RecordMapping):
    """A conversation in one field, its files in others.

    Args:
        field: path of the conversation: a list of turns in any of three forms, ``{from, value}`` (LLaVA),
            ``{role, content}`` (messages) or ``{user, assistant}`` (question and answer).
        files: for each modality the paths of its files, all that are present, in this order.
        place: one of `PLACES`, where files belong.
        markers: one of `MARKED`, the turns in whose words markers stand for files.
        base64: files are texts in base64.
    """

    choices = (1.0,)

    def __init__(
        self,
        field: str,
        files: Mapping[Modality, tuple[str, ...]],
        place: str = "markers",
        markers: str = "user",
        base64: bool = False,
    ) -> None:
        self._field = field
        self._files = dict(files)
        self._place = place
        self._in_answers = markers == "all"
        self._base64 = base64
        known = [re.escape(marker) for marker, modality in MARKERS.items() if modality in files]
        self._markers = re.compile(f"({'|'.join(known)})") if known else None

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        turns: list[Turn] = [(role, self._pieces(content, role)) for role, content in _turns(fields, self._field)]
        files = {modality: all_files(fields, paths, self._base64) for modality, paths in self._files.items()}
        if self._place == "front" or (self._place == "either" and not _places(turns)):
            turns = _in_front(turns, files)
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
            return self._split(content, role)
        if not isinstance(content, list):
            raise BrokenSample(f"broken chat: the content of a {role!r} turn is a {kind_of(content)}")
        items = [_item(item) for item in content]
        if any(isinstance(item, Modality) for item in items):  # they say where the files are: markers are words
            return [words_of(item, self._field) if isinstance(item, str) else item for item in items]
        return [piece for item in items for piece in self._split(item, role)]

    def _split(self, content: Any, role: Role) -> list[str | Modality]:
        """The words of a turn, cut at the markers that are read in it."""
        words = words_of(content, self._field)
        if self._markers is None or (role == "assistant" and not self._in_answers):
            return [words] if words else []
        pieces = enumerate(self._markers.split(words))
        return [MARKERS[piece] if number % 2 else piece for number, piece in pieces if piece]


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
        raise BrokenSample(f"unknown role: {shown(name)}, known are {', '.join(ROLES)}")
    return ROLES[name]


def _item(item: Any) -> str | Modality:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    if isinstance(kind, str) and kind in CONTENT_TYPES:
        return CONTENT_TYPES[kind]
    raise BrokenSample(f"broken chat: content of type {shown(kind)}, known are text, {', '.join(CONTENT_TYPES)}")


def _places(turns: list[Turn]) -> Counter[Modality]:
    """How many files of each modality the turns say the place of."""
    return Counter(piece for _, pieces in turns for piece in pieces if isinstance(piece, Modality))


def _in_front(turns: list[Turn], files: Mapping[Modality, list[bytes]]) -> list[Turn]:
    """The turns without their markers, all files before the words of the first user turn.

    Raises:
        BrokenSample: there are more markers than files, so that a file is missing.
    """
    for modality, number in _places(turns).items():
        if number > len(files.get(modality, ())):
            raise _differ(modality, number, len(files.get(modality, ())))
    turns = [(role, _words_alone(pieces)) for role, pieces in turns]
    front = [modality for modality, found in files.items() for _ in found]
    for number, (role, pieces) in enumerate(turns):
        if role == "user":
            turns[number] = (role, [*front, *pieces])
            break
    return turns


def _words_alone(pieces: list[str | Modality]) -> list[str | Modality]:
    """The words of a turn without markers, nor the line break or space that sets a marker apart from what follows."""
    words: list[str | Modality] = []
    after_marker = False
    for piece in pieces:
        if isinstance(piece, str):
            words.append(_APART.sub("", piece) if after_marker else piece)
        after_marker = not isinstance(piece, str)
    if after_marker and words:
        words[-1] = str(words[-1]).rstrip()
    return ["".join(map(str, words))] if len(words) < len(pieces) and words else words


def _check_turns(turns: list[Turn]) -> None:
    for role, pieces in turns:
        if all(isinstance(piece, str) and is_blank(piece) for piece in pieces):
            raise BrokenSample(f"broken chat: an empty {role!r} turn")
    for (role, _), (following, _) in itertools.pairwise(turns):
        if role == following:
            raise BrokenSample(f"broken chat: two {role!r} turns in a row")
    answers = (piece for role, pieces in turns if role == "assistant" for piece in pieces)
    if all(not isinstance(piece, str) or is_blank(piece) for piece in answers):
        raise BrokenSample("broken chat: no words of the assistant, nothing to learn")


def _check_counts(turns: list[Turn], files: Mapping[Modality, list[bytes]]) -> None:
    places = _places(turns)
    for modality in {*places, *files}:
        if places[modality] != len(files.get(modality, ())):
            raise _differ(modality, places[modality], len(files.get(modality, ())))


def _differ(modality: Modality, markers: int, files: int) -> BrokenSample:
    hint = "; `place` and `markers` of the card say where files belong" if markers < files else ""
    return BrokenSample(
        f"{modality.label} markers and files differ: {markers} markers, {files} files in the record{hint}"
    )
