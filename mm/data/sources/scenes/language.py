"""The caption of a scene, and the scene of a caption.

    Scene ──caption──▶ "a small red apple to the left of a large sailboat on a blue background" ──read──▶ Scene

Every caption says all that there is: `read` gets the scene back, so that a caption that a model wrote can be compared
with its picture fact by fact, and a picture that it drew with its caption. Sentences vary in their frame, in the words
for places, and in the order of mention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mm.data.sources.scenes.compose import BACKGROUNDS, COLOURS, PLACES, SIZES, Placed, Scene, pick

FRAMES = (
    "{things} on a {background} background",
    "on a {background} background, {things}",
    "a {background} background with {things}",
    "{things}; the background is {background}",
)
WORDS = (
    {
        **{place: f"at the {place}" for place in PLACES},
        "left": "on the left",
        "right": "on the right",
        "middle": "in the middle",
    },
    {
        **{place: f"in the {place} corner" for place in PLACES},
        "left": "in the left half",
        "right": "in the right half",
        "top": "in the upper half",
        "bottom": "in the lower half",
        "middle": "in the center",
    },
)
"""Two ways to say each place; a caption keeps to one."""
RELATIONS: dict[tuple[str, ...], tuple[str, str]] = {
    ("left", "right"): ("to the left of", "to the right of"),
    ("top", "bottom"): ("above", "below"),
}
"""Of the first to the second, and of the second to the first."""
TOGETHER: dict[tuple[str, ...], str] = {("left", "right"): "side by side", ("top", "bottom"): "one above the other"}
NUMERALS = {2: "two", 3: "three", 4: "four"}

_PLACE_OF = {words: place for ways in WORDS for place, words in ways.items()}
_WHERE = "|".join([*TOGETHER.values(), *_PLACE_OF])
_THING = re.compile(
    rf"(?P<count>a|{'|'.join(NUMERALS.values())}) (?P<size>{'|'.join(SIZES)})"
    rf"( (?P<colour>{'|'.join(COLOURS)}))? (?P<noun>.+?)( (?P<where>(?:{_WHERE}).*))?"
)
_FRAMES = [
    re.compile(frame.format(things="(?P<things>.+)", background=f"(?P<background>{'|'.join(BACKGROUNDS)})"))
    for frame in FRAMES
]


class NoCaption(ValueError):
    """Words that are not a caption of a scene; the message says which."""


def caption(scene: Scene, plurals: Mapping[str, str], *names: object) -> str:
    """A sentence that says what is where; the names pick one of those that do.

    Args:
        plurals: of the pieces' names.
    """
    words = pick(WORDS, *names, "words")
    places = tuple(one.place for one in scene.pieces)
    if len(set(_looks(scene.pieces))) == 1 < len(scene.pieces):
        things = f"{NUMERALS[len(places)]} {_described(scene.pieces[0], plurals)} {_together(places, words)}"
    elif places in RELATIONS and pick((True, True, False), *names, "relation"):
        first, second = (f"a {_described(one)}" for one in scene.pieces)
        forth, back = RELATIONS[places]
        things = pick((f"{first} {forth} {second}", f"{second} {back} {first}"), *names, "order")
    else:
        listed = [f"a {_described(one)} {words[one.place]}" for one in scene.pieces]
        things = _list(pick((listed, listed[::-1]), *names, "order"))
    return pick(FRAMES, *names, "frame").format(things=things, background=scene.background)


def read(text: str, plurals: Mapping[str, str]) -> Scene:
    """The scene that a caption describes.

    Raises:
        NoCaption: it is not one that `caption` could have given.
    """
    framed = next((match for frame in _FRAMES if (match := frame.fullmatch(text))), None)
    if framed is None:
        raise NoCaption(f"no sentence of a known form: {text!r}")
    order = list(PLACES)
    pieces = sorted(_placed(framed["things"], plurals), key=lambda one: order.index(one.place))
    return Scene(framed["background"], tuple(pieces))


def _looks(pieces: Sequence[Placed]) -> list[tuple[str, str, str | None]]:
    return [(one.piece, one.size, one.colour) for one in pieces]


def _described(one: Placed, plurals: Mapping[str, str] | None = None) -> str:
    noun = plurals[one.piece] if plurals else one.piece
    return f"{one.size} {one.colour} {noun}" if one.colour else f"{one.size} {noun}"


def _together(places: tuple[str, ...], words: Mapping[str, str]) -> str:
    return TOGETHER.get(places) or _list([words[place] for place in places])


def _list(items: Sequence[str]) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def _placed(things: str, plurals: Mapping[str, str]) -> list[Placed]:
    if things.startswith(tuple(NUMERALS.values())):
        return _copies(things, {plural: name for name, plural in plurals.items()})
    for places, (forth, back) in RELATIONS.items():
        for relation, at in ((forth, places), (back, places[::-1])):
            sides = things.split(f" {relation} ")
            if len(sides) == 2:
                return [_one(side, plurals, place) for side, place in zip(sides, at, strict=True)]
    return [_one(item, plurals) for item in re.split(", | and ", things)]


def _one(item: str, nouns: Mapping[str, str], place: str | None = None) -> Placed:
    """The piece of ``a small red apple [on the left]``; a place is said in the words or known from a relation."""
    thing = _parsed(item, nouns)
    said = _PLACE_OF.get(thing["where"]) if thing["where"] else place
    if thing["count"] != "a" or said is None or (place and thing["where"]):
        raise NoCaption(f"expected one thing at one place, found {item!r}")
    return Placed(thing["noun"], said, thing["size"], thing["colour"])


def _copies(things: str, singulars: Mapping[str, str]) -> list[Placed]:
    thing = _parsed(things, singulars)
    straight = {words: places for places, words in TOGETHER.items()}
    where = thing["where"] or ""
    places = straight.get(where) or [_PLACE_OF.get(words) for words in re.split(", | and ", where)]
    if NUMERALS.get(len(places)) != thing["count"]:
        raise NoCaption(f"{thing['count']} things at {len(places)} places: {things!r}")
    found = [place for place in places if place is not None]
    if len(found) < len(places):
        raise NoCaption(f"no known place in {where!r}")
    return [Placed(singulars[thing["noun"]], place, thing["size"], thing["colour"]) for place in found]


def _parsed(item: str, nouns: Mapping[str, str]) -> re.Match[str]:
    thing = _THING.fullmatch(item)
    if thing is None or thing["noun"] not in nouns:
        raise NoCaption(f"no known thing: {item!r}")
    return thing
