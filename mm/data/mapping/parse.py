"""The ``sample:`` of a data card, parsed into the mapping that it describes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from mm.data.mapping.chat import CHAT_FILES, MARKED, PLACES, Chat
from mm.data.mapping.page import PARAGRAPHS, SENTENCES, Page, PictureFiles
from mm.data.mapping.parts import Alternative, MediaFiles, Order, Parts, TextPart
from mm.data.mapping.record import ROLES, RecordMapping
from mm.sample import Modality

MOST_CHOICES = 1024
"""Most choices of a card: orders times the alternatives of each of its texts."""


class MappingError(ValueError):
    """A ``sample:`` that does not follow the form; the message names the key and what is allowed."""


def parse_mapping(spec: Any) -> RecordMapping:
    """The mapping that the ``sample:`` of a card describes, see ``data_cards/README.md``.

    Raises:
        MappingError: an unknown key or a value of the wrong kind; names it and what is allowed.
    """
    if isinstance(spec, list) and spec:
        return _limited(_parse_parts(spec, "sample"))
    if isinstance(spec, dict) and "parts" in spec:
        check_keys(spec, ("parts", "orders"), (), "sample")
        parts = _parse_parts(spec["parts"], "sample.parts")
        return _limited(parts, _parse_orders(spec["orders"], parts))
    if isinstance(spec, dict) and "chat" in spec:
        return _parse_chat(spec)
    if isinstance(spec, dict) and "texts" in spec:
        return _parse_page(spec)
    raise MappingError(
        "sample: expected a list of parts, or a mapping with `chat`, with `texts` and `images`, or with `parts` and "
        "`orders`"
    )


def _limited(parts: tuple[TextPart | MediaFiles, ...], orders: tuple[Order, ...] = ()) -> Parts:
    """The mapping of some parts; every choice costs a column of the index, and alternatives multiply."""
    texts = [len(part.alternatives) for part in parts if isinstance(part, TextPart)]
    if (choices := math.prod(texts) * max(1, len(orders))) > MOST_CHOICES:
        raise MappingError(
            f"sample: alternatives and orders multiply to {choices:,} choices, expected {MOST_CHOICES:,} at most"
        )
    return Parts(parts, orders)


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
    check_keys(spec, ("chat",), ("place", *CHAT_FILES, "encoding", "markers"), "sample")
    if not isinstance(spec["chat"], str):
        raise MappingError(f"sample.chat: {spec['chat']!r}, expected the path of the field with the conversation")
    place, markers = _one_of(spec, "place", PLACES, "sample"), _one_of(spec, "markers", MARKED, "sample")
    files = {modality: _parse_paths(spec[key], f"sample.{key}") for key, modality in CHAT_FILES.items() if key in spec}
    return Chat(spec["chat"], files, place, markers, _parse_encoding(spec, "sample"))


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
