"""Which pieces stand where: a scene as facts, drawn from (seed, split, number), and the split that it belongs to.

    top left     top     top right
      left      middle     right          a place is a cell's centre; a layout is a set of places whose pieces cannot
    bottom left bottom  bottom right      overlap, because their centres differ by half of the picture in one axis

What may be learnt by heart is kept apart from what has to be composed. Every scene that there can be belongs to one
split, for any seed:

    heldout      holds a combination that is new: two pieces, a piece at a place, or a piece in a colour
    validation   a tenth of the others: new scenes of known combinations
    train        the rest
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from mm.data.sources.writer import rank

SPLITS = ("train", "validation", "heldout")
NEW = 0.1
"""Share of all combinations that only held-out scenes have."""
VALIDATION = 0.1
"""Share of the scenes of known combinations that are for validation."""

PLACES = {
    f"{row} {column}".strip() or "middle": (x, y)
    for y, row in enumerate(("top", "", "bottom"))
    for x, column in enumerate(("left", "", "right"))
}
"""Names in reading order, and the cell of the 3 × 3 grid: column, row."""

LAYOUTS = (
    tuple((place,) for place in PLACES),
    (("left", "right"), ("top", "bottom"), ("top left", "bottom right"), ("top right", "bottom left")),
    (
        ("top", "bottom left", "bottom right"),
        ("top left", "top right", "bottom"),
        ("top left", "right", "bottom left"),
        ("top right", "left", "bottom right"),
    ),
    (("top left", "top right", "bottom left", "bottom right"),),
)
"""Places of one, two, three and four pieces."""

NUMBERS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 4)
"""Pieces of a scene, as often as they are drawn."""
SAME = (True, False, False, False, False)
"""Whether several pieces are copies of one."""
SIZES = {"small": 20 / 64, "large": 30 / 64}
"""Longest side of a piece, as a share of the picture's side."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (0, 0, 0),
    "red": (190, 30, 45),
    "yellow": (250, 225, 110),
    "green": (60, 145, 75),
    "blue": (85, 150, 225),
    "pink": (250, 185, 210),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
TINTED = 1 / 3
"""Share of the pieces that are drawn in another colour than their own."""

Look = tuple[str, str | None]
"""A piece and the colour it is painted in, or None for its own colours."""

T = TypeVar("T")


class NoScene(ValueError):
    """No scene can be drawn of these pieces."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece in a scene: its name, a key of `PLACES`, a key of `SIZES`, and one of `COLOURS` or None for its own."""

    piece: str
    place: str
    size: str
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """background: a key of `BACKGROUNDS`; pieces: in the order of `PLACES`."""

    background: str
    pieces: tuple[Placed, ...]


def pick(options: Sequence[T], *names: object) -> T:
    """One of the options, the same for the same names everywhere."""
    return options[rank(*names) % len(options)]


def draw_scene(
    seed: int, split: str, number: int, pieces: Sequence[str], visible: Mapping[Look, Collection[str]]
) -> Scene:
    """The scene of that number: a layout, filled anew until it is one of the split.

    The layout is not drawn anew, or else held-out scenes would have more pieces than others, which are more likely to
    be new.

    Args:
        pieces: names to draw from.
        visible: backgrounds before which each piece in each colour, and in its own, can be seen.

    Raises:
        NoScene: there is none after ten thousand attempts.
    """
    places = pick(LAYOUTS[pick(NUMBERS, seed, split, number, "pieces") - 1], seed, split, number, "layout")
    same = pick(SAME, seed, split, number, "same")
    for attempt in range(10_000):
        names = (seed, split, number, attempt)
        background = pick(list(BACKGROUNDS), *names, "background")
        if same:
            model = _draw_piece(pieces, places[0], *names)
            drawn = tuple(replace(model, place=place) for place in places)
        else:
            drawn = tuple(_draw_piece(pieces, place, *names) for place in places)
        scene = Scene(background, drawn)
        mixed_up = not same and len({one.piece for one in drawn}) < len(drawn)
        seen = all(background in visible[one.piece, one.colour] for one in drawn)
        if seen and not mixed_up and split_of(scene) == split:
            return scene
    raise NoScene(f"no scene {number} of {split} from {len(pieces)} pieces at {', '.join(places)}; take more pieces")


def _draw_piece(pieces: Sequence[str], place: str, *names: object) -> Placed:
    tinted = rank(*names, place, "tinted") < TINTED * 2**64
    return Placed(
        pick(pieces, *names, place, "piece"),
        place,
        pick(list(SIZES), *names, place, "size"),
        pick(COLOURS, *names, place, "colour") if tinted else None,
    )


def split_of(scene: Scene) -> str:
    """The one split that may hold the scene."""
    if new_combinations(scene):
        return "heldout"
    facts = [fact for one in scene.pieces for fact in (one.piece, one.place, one.size, one.colour)]
    return "validation" if rank("scene", scene.background, *facts) < VALIDATION * 2**64 else "train"


def new_combinations(scene: Scene) -> list[str]:
    """Those that no scene of train or validation has, such as ``cat with drum``, ``cat: top left``, ``red cat``."""
    return [name for name in _combinations(scene) if _is_new(name)]


def _combinations(scene: Scene) -> list[str]:
    pairs = itertools.combinations(sorted({one.piece for one in scene.pieces}), 2)
    places = [f"{one.piece}: {one.place}" for one in scene.pieces]
    colours = {f"{one.colour} {one.piece}": None for one in scene.pieces if one.colour}
    return [*(" with ".join(pair) for pair in pairs), *places, *colours]


@cache
def _is_new(combination: str) -> bool:
    return rank("combination", combination) < NEW * 2**64
