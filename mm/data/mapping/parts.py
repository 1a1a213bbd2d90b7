"""A list of parts, each read from a field, in one of some orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mm.data.mapping.files import first_files
from mm.data.mapping.record import Fields, RecordMapping
from mm.data.mapping.words import first_words
from mm.sample import MEDIA_PARTS, Modality, Part, Role, Text


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
                parts.append(Text(first_words(fields, next(picked).fields), part.loss, part.role))
            else:
                kind = MEDIA_PARTS[part.modality]
                parts += [kind(data, part.role) for data in first_files(fields, part.fields, part.base64)]
        return tuple(parts)

    def paths(self) -> Iterator[str]:
        for part in self._parts:
            if isinstance(part, TextPart):
                yield from itertools.chain.from_iterable(one.fields for one in part.alternatives)
            else:
                yield from part.fields
