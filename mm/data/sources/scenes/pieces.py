"""Pieces of scenes: drawings of the demo corpus, cut out of their white page, painted and made small.

picture on white ──cut out──▶ RGBA ──paint──▶ in one colour or its own ──shrink──▶ sprite
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image as PillowImage

from mm.data.card import Card
from mm.data.sources.scenes.compose import BACKGROUNDS, COLOURS, Look
from mm.data.sources.tables import read_table
from mm.data.sources.writer import BuildError
from mm.media import decode
from mm.sample import Image

NEAR_WHITE = 72
"""Sum over the channels by which a pixel of the page differs from white at most: lossy WebP leaves ripples there."""
PAINTS = {
    "red": (222, 30, 40),
    "orange": (250, 130, 25),
    "yellow": (250, 215, 40),
    "green": (40, 165, 60),
    "blue": (35, 85, 225),
    "purple": (145, 55, 185),
}
APART = 80
"""Distance in RGB from which on a pixel stands out from the background."""
SEEN = 0.6
"""Share of a piece that must stand out."""


class PieceName(NamedTuple):
    """A row of the table: the drawing's file in its package, what it is called, and what several of it are called."""

    file: str
    name: str
    plural: str


@dataclass(frozen=True, eq=False)
class Pieces:
    """names: by name; cut: RGBA pictures by name."""

    names: Mapping[str, PieceName]
    cut: Mapping[str, PillowImage.Image]

    @classmethod
    def load(cls, table: Path, card: Path) -> Pieces:
        """The pieces of a table, cut out of the drawings of the card's train split.

        Raises:
            FileNotFoundError: no table there, or the card lacks drawings that it names.
            ValueError: another header, an empty column, or a name that stands twice or would not read back.
        """
        names = read_pieces(table)
        wanted = {row.file: name for name, row in names.items()}
        demo = Card.load(card)
        records = (one.record for shard in demo.shards("train") for one in demo.open(shard).scan() if one.record)
        cut = {}
        for record in records:
            name = wanted.get(json.loads(record.fields["json"])["file"])
            if name is not None:
                cut[name] = cut_out(cast(PillowImage.Image, decode(Image(record.fields["webp"]))))
        if missing := sorted(names.keys() - cut.keys()):
            raise FileNotFoundError(f"{card} lacks {len(missing)} drawings of {table}: {', '.join(missing[:3])}")
        return cls(names, {name: cut[name] for name in names})

    @cached_property
    def plurals(self) -> dict[str, str]:
        """By name."""
        return {name: row.plural for name, row in self.names.items()}

    @cached_property
    def visible(self) -> dict[Look, frozenset[str]]:
        """The backgrounds before which each piece, in its own colours and in each other, can be seen."""
        return {
            (name, colour): frozenset(_backgrounds(self.sprite(name, colour, 32)) - {colour})
            for name in self.cut
            for colour in (None, *COLOURS)
        }

    def sprite(self, name: str, colour: str | None, side: int) -> PillowImage.Image:
        """RGBA, `side` pixels on its longer side."""
        picture = self.cut[name]
        return shrunk(paint(picture, PAINTS[colour]) if colour else picture, side)


def read_pieces(table: Path) -> dict[str, PieceName]:
    """The rows of a table of pieces, by name."""
    if not table.is_file():
        raise FileNotFoundError(f"no table of pieces at {table}; the repository has one in data_cards/demo")
    rows = [PieceName(*line) for line in read_table(table, PieceName._fields)]
    for column in PieceName._fields:
        values = Counter(getattr(row, column) for row in rows)
        if repeated := [value for value, times in values.items() if times > 1]:
            raise BuildError(f"{table}: {column} {repeated[0]!r} stands {values[repeated[0]]} times")
    return {row.name: row for row in rows}


def cut_out(picture: PillowImage.Image) -> PillowImage.Image:
    """RGBA: transparent where near-white is connected with the edge, cut to what is left. White inside stays white."""
    values = np.pad(np.asarray(picture, dtype=np.int16), ((1, 1), (1, 1), (0, 0)), constant_values=255)
    page = _connected((255 - values).sum(axis=2) <= NEAR_WHITE)
    rgba = np.dstack([values, np.where(page, 0, 255)]).astype(np.uint8)
    cut = PillowImage.fromarray(rgba, "RGBA")
    return cut.crop(cut.getchannel("A").getbbox())


def _connected(free: np.ndarray) -> np.ndarray:
    """The cells of a (H, W) bool grid that a path of free cells joins with its first one, in steps along the axes."""
    reached = np.zeros_like(free)
    reached[0, 0] = free[0, 0]
    before = -1
    while (now := int(reached.sum())) > before:
        before = now
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & free
    return reached


def paint(picture: PillowImage.Image, colour: tuple[int, int, int]) -> PillowImage.Image:
    """The RGBA picture in shades of one colour: the colour itself where it is as bright as half of it, else near it."""
    values = np.asarray(picture, dtype=np.float64)
    grey = values[..., :3] @ (0.299, 0.587, 0.114)
    darkest, middle, lightest = np.percentile(grey[values[..., 3] > 127], (1, 50, 99))
    # A silhouette has one brightness: without room on both sides of it, all of it would be the darkest shade.
    tones = (min(darkest, middle - 16), middle, max(lightest, middle + 16))
    pure = np.array(colour, dtype=np.float64)
    shades = np.stack([0.4 * pure, pure, 0.6 * pure + 0.4 * 255])
    painted = [np.interp(grey, tones, shades[:, channel]) for channel in range(3)]
    return PillowImage.fromarray(np.dstack([*painted, values[..., 3]]).round().astype(np.uint8), "RGBA")


def shrunk(picture: PillowImage.Image, side: int) -> PillowImage.Image:
    """The RGBA picture with a longer side of `side` pixels; what is transparent lends no colour to its neighbours."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGBa").resize(size, PillowImage.Resampling.BOX).convert("RGBA")


def _backgrounds(sprite: PillowImage.Image) -> set[str]:
    values = np.asarray(sprite, dtype=np.float64)
    shape = values[..., 3] > 127
    colours = {name: np.linalg.norm(values[shape, :3] - rgb, axis=1) for name, rgb in BACKGROUNDS.items()}
    return {name for name, distances in colours.items() if (distances > APART).mean() >= SEEN}
