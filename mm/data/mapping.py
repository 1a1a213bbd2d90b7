"""How a record becomes a sample: the ``sample:`` of a data card.

    Parts   a list of parts, each read from a field, in an order  caption pairs, transcripts, questions in columns
    Chat    one field holds a conversation with media markers     LLaVA turns, message lists, question–answer lists
    Page    two lists hold the texts and pictures of a page       OBELICS, InfiMM-WebMath, MMC4

A field is named by a path: ``txt``; ``json.recaption``, a key of the JSON in ``json``; ``captions.0``, the first of a
list column. Nothing in a record is executed, opened as a path or fetched as an address.
"""

from __future__ import annotations

import binascii
import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mm.sample import MEDIA_PARTS, BrokenSample, Image, Modality, Part, Role, Text

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

PARAGRAPHS, SENTENCES = "\n\n", " "
"""What stands between neighbouring texts of a page: of one whose lists lie side by side, and of one with sentences."""

Fields = Mapping[str, Any]
Turn = tuple[Role, list[str | Modality]]
"""Who speaks, and the words, with a modality where a file of it belongs."""


class MappingError(ValueError):
    """A ``sample:`` that does not follow the form; the message names the key and what is allowed."""


class RecordMapping(ABC):
    """Record to parts. `choices` are the probabilities of the alternative texts and orders, at least one.

    Under every choice a sample has the same items of each modality, in the same order among themselves: facts and codes
    of a row hold for all of its choices.
    """

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

    def dropped(self, fields: Fields) -> int:
        """Number of files that the record lacks and that its sample does without, because the card says so."""
        return 0


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
    base64: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """Places of the parts of the card in the order in which they come, and the probability of this order.

    Parts of one kind keep the order of the card.
    """

    places: tuple[int, ...]
    p: float = 1.0


class Parts(RecordMapping):
    """Parts in one of some orders. A choice picks an order and one alternative of every text, the last text fastest."""

    def __init__(self, parts: tuple[TextPart | MediaFiles, ...], orders: tuple[Order, ...] = ()) -> None:
        self._parts = parts
        orders = orders or (Order(tuple(range(len(parts)))),)
        alternatives = [part.alternatives for part in parts if isinstance(part, TextPart)]
        self._combinations = [(order, picked) for order in orders for picked in itertools.product(*alternatives)]
        self.choices = tuple(order.p * math.prod(one.p for one in picked) for order, picked in self._combinations)

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        order, alternatives = self._combinations[choice]
        picked = iter(alternatives)
        parts: list[Part] = []
        for part in (self._parts[place] for place in order.places):
            if isinstance(part, TextPart):
                parts.append(Text(_first_words(fields, next(picked).fields), part.loss, part.role))
            else:
                kind = MEDIA_PARTS[part.modality]
                parts += [kind(data, part.role) for data in _first_files(fields, part.fields, part.base64)]
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
        files = {modality: _all_files(fields, paths, self._base64) for modality, paths in self._files.items()}
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


# --------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """Where the picture of an entry of a page's list is.

    The entry itself is bytes, Hugging Face's ``{bytes, path}``, or the name of a file of the record (what follows the
    first dot of a member's name, in any case).

    file: the entry is a mapping, and this its key for the same
    numbered: instead, picture n of the page, counted from 0, is the first field that is there of ``n.<extension>``
    base64: text is not a name but the file in base64
    """

    file: str | None = None
    numbered: tuple[str, ...] = ()
    base64: bool = False

    def find(self, fields: Fields, entry: Any, number: int) -> bytes | None:
        """The file of picture `number` of a page, None if the record does not hold it.

        Raises:
            BrokenSample: the entry is of another form.
        """
        if self.numbered:
            entry = next(filter(None, (fields.get(f"{number}.{extension}") for extension in self.numbered)), None)
        elif self.file is not None:
            if not isinstance(entry, dict):
                raise BrokenSample(
                    f"broken page: picture {number} is a {_kind(entry)}, not a mapping with {self.file!r}"
                )
            entry = entry.get(self.file)
        if isinstance(entry, dict):
            entry = entry.get("bytes")
        if isinstance(entry, str):
            entry = _from_base64(entry, f"picture {number}") if self.base64 else fields.get(entry.lower())
        if not isinstance(entry, bytes | None):
            raise BrokenSample(f"no file: picture {number} of the page is a {_kind(entry)}")
        return entry or None


class Page(RecordMapping):
    """An interleaved page in two lists, in one of two forms.

    Side by side (OBELICS, InfiMM-WebMath): lists of equal length, of which exactly one holds something at each place.
    Matched (MMC4): the entries of `images` are mappings that tell the number of the text that they stand before.

    Neighbouring texts become one part, and blank ones none; the words are left as they are.

    Args:
        texts: path of the list of texts.
        images: path of the list of pictures.
        files: where the pictures are.
        at: key of the text's number in the entries of a matched page, None for lists that lie side by side.
        drop: leave out a picture that the record does not hold, instead of refusing the page.
        join: stands between neighbouring texts.
    """

    choices = (1.0,)

    def __init__(
        self, texts: str, images: str, files: PictureFiles, at: str | None = None, drop: bool = False, join: str = ""
    ) -> None:
        self._texts = texts
        self._images = images
        self._files = files
        self._at = at
        self._drop = drop
        self._join = join

    def parts(self, fields: Fields, choice: int) -> tuple[Part, ...]:
        found = [one for one in self._contents(fields) if one is not None]
        parts: list[Part] = []
        for is_text, group in itertools.groupby(found, lambda one: isinstance(one, str)):
            if is_text:
                parts.append(Text(self._join.join(map(str, group))))
            else:
                parts += [Image(data) for data in group if isinstance(data, bytes)]
        if not any(isinstance(part, Text) for part in parts):
            raise BrokenSample("empty text: the page holds no words, nothing to learn")
        return tuple(parts)

    def paths(self) -> Iterator[str]:
        yield self._texts
        yield self._images

    def dropped(self, fields: Fields) -> int:
        return sum(one is None for one in self._contents(fields)) if self._drop else 0

    def _contents(self, fields: Fields) -> Iterator[str | bytes | None]:
        """Texts that are not blank and pictures in the order of the page, None for a picture that is dropped."""
        texts, images = (_list(fields, path) for path in (self._texts, self._images))
        return self._side_by_side(fields, texts, images) if self._at is None else self._matched(fields, texts, images)

    def _side_by_side(self, fields: Fields, texts: list[Any], images: list[Any]) -> Iterator[str | bytes | None]:
        if len(texts) != len(images):
            raise BrokenSample(
                f"broken page: {len(texts)} {self._texts!r} beside {len(images)} {self._images!r}; lists without `at` "
                "are of equal length"
            )
        number = 0
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if text is None:
                yield self._picture(fields, image, number)
                number += 1
            elif image is not None:
                raise BrokenSample(f"broken page: a text and a picture at place {place}, where one should be null")
            else:
                yield from self._words(text)

    def _matched(self, fields: Fields, texts: list[Any], images: list[Any]) -> Iterator[str | bytes | None]:
        before: defaultdict[int, list[bytes | None]] = defaultdict(list)
        for number, entry in enumerate(images):
            place = entry.get(self._at) if isinstance(entry, dict) else None
            if type(place) is not int or not 0 <= place < len(texts):
                raise BrokenSample(f"broken page: {self._at!r} of picture {number} is {place!r}, of {len(texts)} texts")
            before[place].append(self._picture(fields, entry, number))
        for number, text in enumerate(texts):
            yield from before[number]
            yield from self._words(text)

    def _picture(self, fields: Fields, entry: Any, number: int) -> bytes | None:
        data = self._files.find(fields, entry, number)
        if data is None and not self._drop:
            raise BrokenSample(
                f"missing picture: no bytes for picture {number} of the page, {repr(entry)[:120]}; the record has "
                f"{', '.join(sorted(fields))[:120]}. Addresses are not fetched; `missing: drop` in the card leaves "
                "such pictures out"
            )
        return data

    def _words(self, text: Any) -> Iterator[str]:
        words = _words(text, self._texts)
        if words.strip():
            yield words


def _list(fields: Fields, path: str) -> list[Any]:
    value = _parsed(look_up(fields, path), path)
    if value is None:
        raise BrokenSample(_missing((path,), fields))
    if not isinstance(value, list):
        raise BrokenSample(f"broken page: {path!r} holds a {_kind(value)}, not a list")
    return value


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


def _first_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    """Files of the first field that holds any."""
    for path in paths:
        if files := _files(look_up(fields, path), path, base64):
            return files
    raise BrokenSample(_missing(paths, fields))


def _all_files(fields: Fields, paths: tuple[str, ...], base64: bool) -> list[bytes]:
    return [data for path in paths for data in _files(look_up(fields, path), path, base64)]


def _files(value: Any, path: str, base64: bool) -> list[bytes]:
    """Encoded files of a field: bytes, Hugging Face's ``{bytes, path}``, text in base64, or a list of these."""
    if value is None:
        return []
    if isinstance(value, list):
        return [data for one in value for data in _files(one, path, base64)]
    if isinstance(value, dict):
        if value.get("bytes") is None:
            raise BrokenSample(f"no file: {path!r} holds a path or an address instead of bytes")
        value = value["bytes"]
    if isinstance(value, str):
        if not base64:
            raise BrokenSample(
                f"no file: {path!r} holds the text {value[:60]!r}; paths and addresses are never opened, and base64 "
                "needs `encoding: base64` in the card"
            )
        value = _from_base64(value, path)
    if not isinstance(value, bytes):
        raise BrokenSample(f"no file: {path!r} holds a {_kind(value)}")
    if not value:
        raise BrokenSample(f"empty file: {path!r}")
    return [value]


def _from_base64(text: str, path: str) -> bytes:
    """The bytes behind base64, with or without ``data:image/jpeg;base64,`` before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenSample(f"broken base64: {path!r} holds {text[:60]!r}: {error}") from error


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
        return Parts(_parse_parts(spec, "sample"))
    if isinstance(spec, dict) and "parts" in spec:
        check_keys(spec, ("parts", "orders"), (), "sample")
        parts = _parse_parts(spec["parts"], "sample.parts")
        return Parts(parts, _parse_orders(spec["orders"], parts))
    if isinstance(spec, dict) and "chat" in spec:
        return _parse_chat(spec)
    if isinstance(spec, dict) and "texts" in spec:
        return _parse_page(spec)
    raise MappingError(
        "sample: expected a list of parts, or a mapping with `chat`, with `texts` and `images`, or with `parts` and "
        "`orders`"
    )


def _parse_parts(spec: Any, where: str) -> tuple[TextPart | MediaFiles, ...]:
    if not isinstance(spec, list) or not spec:
        raise MappingError(f"{where}: {spec!r}, expected a list of parts such as `text: txt`")
    parts = tuple(_parse_part(part, f"{where}[{number}]") for number, part in enumerate(spec))
    if len({part.role is None for part in parts}) > 1:
        raise MappingError(f"{where}: give every part a `role`, which makes the sample a chat, or none of them")
    return parts


def _parse_orders(spec: Any, parts: tuple[TextPart | MediaFiles, ...]) -> tuple[Order, ...]:
    """Orders of parts that are named by their kind: the second `text` of an order is the second text of the card."""
    if not isinstance(spec, list) or not spec:
        raise MappingError(f"sample.orders: {spec!r}, expected a list such as `{{p: 0.5, parts: [text, image]}}`")
    places = defaultdict(list)
    for place, part in enumerate(parts):
        places[(Modality.TEXT if isinstance(part, TextPart) else part.modality).label].append(place)
    kinds = sorted(kind for kind, of_kind in places.items() for _ in of_kind)
    orders = []
    for number, one in enumerate(spec):
        check_keys(one, ("p", "parts"), (), f"sample.orders[{number}]")
        if not isinstance(one["parts"], list) or sorted(map(str, one["parts"])) != kinds:
            raise MappingError(
                f"sample.orders[{number}].parts: {one['parts']!r}, expected the parts {', '.join(kinds)} in some order"
            )
        following = {kind: iter(of_kind) for kind, of_kind in places.items()}
        orders.append(tuple(next(following[kind]) for kind in one["parts"]))
    return tuple(map(Order, orders, _parse_probabilities(spec, "sample.orders")))


def _parse_part(spec: Any, where: str) -> TextPart | MediaFiles:
    kinds = {modality.label: modality for modality in Modality}
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in kinds:
        raise MappingError(
            f"{where}: expected one part such as `text: txt`, of the kinds {', '.join(kinds)}; got {spec!r}"
        )
    kind, source = next(iter(spec.items()))
    modality, where = kinds[kind], f"{where}.{kind}"
    options = source if isinstance(source, dict) else {"from": source}
    check_keys(options, ("from",), ("role", "loss") if modality == Modality.TEXT else ("role", "encoding"), where)
    role = options.get("role")
    if role is not None and (not isinstance(role, str) or role not in ROLES):
        raise MappingError(f"{where}.role: {role!r}, allowed are {', '.join(ROLES)}")
    role = None if role is None else ROLES[role]
    if modality != Modality.TEXT:
        return MediaFiles(modality, _parse_paths(options["from"], where), role, _parse_encoding(options, where))
    loss = options.get("loss", role in (None, "assistant"))
    if not isinstance(loss, bool):
        raise MappingError(f"{where}.loss: {loss!r}, expected true or false")
    return TextPart(_parse_alternatives(options["from"], where), loss, role)


def _parse_alternatives(spec: Any, where: str) -> tuple[Alternative, ...]:
    if not isinstance(spec, list) or not all(isinstance(one, dict) for one in spec):
        return (Alternative(_parse_paths(spec, where)),)
    for number, one in enumerate(spec):
        check_keys(one, ("from", "p"), (), f"{where}[{number}]")
    probabilities = _parse_probabilities(spec, where)
    paths = [_parse_paths(one["from"], f"{where}[{number}]") for number, one in enumerate(spec)]
    return tuple(map(Alternative, paths, probabilities))


def _parse_probabilities(spec: list[dict[str, Any]], where: str) -> list[float]:
    """The `p` of each of some options."""
    for number, one in enumerate(spec):
        if not isinstance(one["p"], int | float) or not 0 < one["p"] <= 1:
            raise MappingError(f"{where}[{number}].p: {one['p']!r}, expected a probability")
    if abs((total := sum(one["p"] for one in spec)) - 1) > 1e-6:
        raise MappingError(f"{where}: the probabilities `p` add up to {total:g}, expected 1")
    return [float(one["p"]) for one in spec]


def _parse_chat(spec: dict[str, Any]) -> Chat:
    check_keys(spec, ("chat",), ("place", *CHAT_FILES, "encoding"), "sample")
    if not isinstance(spec["chat"], str):
        raise MappingError(f"sample.chat: {spec['chat']!r}, expected the path of the field with the conversation")
    place = _one_of(spec, "place", ("markers", "front"), "sample")
    files = {modality: _parse_paths(spec[key], f"sample.{key}") for key, modality in CHAT_FILES.items() if key in spec}
    return Chat(spec["chat"], files, place == "front", _parse_encoding(spec, "sample"))


def _parse_page(spec: dict[str, Any]) -> Page:
    check_keys(spec, ("texts", "images"), ("at", "file", "numbered", "encoding", "missing", "join"), "sample")
    for key in ("texts", "images", "at", "file", "join"):
        if key in spec and not (isinstance(spec[key], str) and (spec[key] or key == "join")):
            raise MappingError(f"sample.{key}: {spec[key]!r}, expected a text")
    if "numbered" in spec and ("file" in spec or "encoding" in spec):
        raise MappingError("sample.numbered: says where the pictures are, and so does `file` or `encoding`; keep one")
    if "at" in spec and "numbered" not in spec and "file" not in spec:
        raise MappingError(
            "sample: where `images` is a list of mappings, as `at` has it, `file` names their key with the picture or "
            "its name, or `numbered` the extensions of the picture files"
        )
    numbered = _parse_paths(spec["numbered"], "sample.numbered") if "numbered" in spec else ()
    files = PictureFiles(
        spec.get("file"), tuple(extension.lower() for extension in numbered), _parse_encoding(spec, "sample")
    )
    drop = _one_of(spec, "missing", ("error", "drop"), "sample") == "drop"
    join = spec.get("join", SENTENCES if "at" in spec else PARAGRAPHS)
    return Page(spec["texts"], spec["images"], files, spec.get("at"), drop, join)


def _parse_encoding(spec: dict[str, Any], where: str) -> bool:
    return "encoding" in spec and _one_of(spec, "encoding", ("base64",), where) == "base64"


def _one_of(spec: dict[str, Any], key: str, allowed: tuple[str, ...], where: str) -> str:
    """The value of a key, the first that is allowed if it is not there."""
    value = spec.get(key, allowed[0])
    if value not in allowed:
        raise MappingError(f"{where}.{key}: {value!r}, allowed are {', '.join(allowed)}")
    return value


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
