"""A stream of scenes of any length: pieces of the demo corpus on a plain background, and captions that say all of it.

    (seed, split, number) ──compose──▶ Scene ──┬──pieces───▶ picture
                                               └──language─▶ caption

Nothing is read but the drawings and their names, so that a training run of any number of tokens sees each scene once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PillowImage

from mm.data.passes import each_shard
from mm.data.sources.scenes.compose import BACKGROUNDS, PLACES, SIZES, SPLITS, Scene, draw_scene, new_combinations
from mm.data.sources.scenes.language import caption
from mm.data.sources.scenes.pieces import Pieces
from mm.data.sources.staging import staged
from mm.data.sources.writer import BuildError, Member, Report, shard_path, write_card, write_shard

DEMO = Path(__file__).parents[4] / "data_cards" / "demo"
SAMPLE = [{"image": "webp"}, {"text": "json.caption"}]
ORDERS = [{"p": 0.5, "parts": ["image", "text"]}, {"p": 0.5, "parts": ["text", "image"]}]
CARD = {
    "name": "scenes",
    "licence": "public domain, as the drawings that the scenes are made of",
    "description": "Drawings of the demo corpus on plain backgrounds; captions that say what is where.",
}
SMALLEST = 32
"""Pixels of the smallest picture; a small piece has ten there."""


class Stream(NamedTuple):
    """What a scene of a number is a function of."""

    pieces: Path
    seed: int
    size: int


class Chunk(NamedTuple):
    """The scenes of one shard: numbers from `first` to before `end`."""

    split: str
    shard: int
    first: int
    end: int


def build(
    out: Path,
    samples: int = 30_000,
    validation: int = 1_000,
    heldout: int = 1_000,
    size: int = 64,
    seed: int = 0,
    pieces: Path = DEMO / "pieces.tsv",
    samples_per_shard: int = 1_000,
) -> Report:
    """Write shards and cards. More samples of the same seed begin with the same ones.

    Args:
        out: folder for the shards, ``card.yaml``, and ``orders.yaml`` with the words first in half of the samples.
        samples: scenes to train on.
        validation: new scenes of combinations that train has.
        heldout: scenes with combinations that train never has, for any seed and any number of samples.
        size: side of a picture in pixels.
        seed: of all that is drawn.
        pieces: table of the drawings to use; columns file, name, plural.
        samples_per_shard: where shards are cut.

    Raises:
        FileNotFoundError: no table of pieces, or drawings that the demo corpus lacks.
        BuildError: a number that makes no sense, or a faulty table.
        NoScene: too few pieces.
    """
    numbers = {"train": samples, "validation": validation, "heldout": heldout}
    if size < SMALLEST:
        raise BuildError(f"size={size}, expected {SMALLEST} pixels or more: nothing could be told on less")
    if min(numbers.values()) < 0 or samples_per_shard < 1:
        raise BuildError(
            f"samples of {numbers} in shards of {samples_per_shard}, expected 0 or more in shards of 1 or more"
        )
    chunks = [
        Chunk(split, shard, first, min(first + samples_per_shard, number))
        for split, number in numbers.items()
        for shard, first in enumerate(range(0, number, samples_per_shard))
    ]
    stream = Stream(pieces, seed, size)
    _load(pieces)  # a faulty table is found before there are processes
    origin = f"`mm data build scenes OUT samples={samples} size={size} seed={seed}` from data_cards/demo/card.yaml"
    cards = {"card.yaml": SAMPLE, "orders.yaml": {"parts": SAMPLE, "orders": ORDERS}}
    with staged(out, SPLITS, cards) as stage:
        written = each_shard(partial(_write, stream, stage), chunks, None, "shards of scenes", progress=True)
        counts = {
            split: sum(count for chunk, count in written.items() if chunk.split == split)
            for split, number in numbers.items()
            if number
        }
        statistics = {split: {"samples": count} for split, count in counts.items()}
        for name, sample in cards.items():
            facts = {"origin": origin, "splits": list(counts), "sample": sample, "statistics": statistics}
            write_card(stage / name, {**CARD, **facts})
    return Report(counts)


def scene_sample(stream: Stream, split: str, number: int) -> Member:
    """The sample of that number: its picture (lossless WebP), and under ``json`` its caption and all facts."""
    pieces = _load(stream.pieces)
    scene = draw_scene(stream.seed, split, number, list(pieces.names), pieces.visible)
    picture = BytesIO()
    render(scene, stream.size, pieces).save(picture, "webp", lossless=True, quality=0, method=1)
    words = caption(scene, pieces.plurals, stream.seed, split, number)
    key = f"{split}-{stream.seed}-{number:08d}"
    return Member(key, {"webp": picture.getvalue(), "json": {"caption": words, **record(scene, stream.size, pieces)}})


def record(scene: Scene, size: int, pieces: Pieces) -> dict[str, Any]:
    """Facts of a scene; ``box`` is left, top, right and bottom in pixels."""
    return {
        "background": scene.background,
        "pieces": [
            {"name": one.piece, "place": one.place, "size": one.size, "colour": one.colour, "box": box}
            for one, (_, box) in zip(scene.pieces, _sprites(scene, size, pieces), strict=True)
        ],
        "new": new_combinations(scene),
    }


def render(scene: Scene, size: int, pieces: Pieces) -> PillowImage.Image:
    """The RGB picture of a scene, `size` pixels wide and high."""
    picture = PillowImage.new("RGB", (size, size), BACKGROUNDS[scene.background])
    for sprite, box in _sprites(scene, size, pieces):
        picture.paste(sprite, box, sprite)
    return picture


def _sprites(scene: Scene, size: int, pieces: Pieces) -> Iterator[tuple[PillowImage.Image, tuple[int, int, int, int]]]:
    for one in scene.pieces:
        sprite = _sprite(pieces, one.piece, one.colour, round(SIZES[one.size] * size))
        x, y = ((cell + 1) * size // 4 for cell in PLACES[one.place])
        left, top = x - sprite.width // 2, y - sprite.height // 2
        yield sprite, (left, top, left + sprite.width, top + sprite.height)


def _write(stream: Stream, out: Path, chunk: Chunk) -> int:
    members = (scene_sample(stream, chunk.split, number) for number in range(chunk.first, chunk.end))
    return write_shard(members, shard_path(out, chunk.split, chunk.shard))


@cache
def _load(table: Path) -> Pieces:
    """The pieces, once a process."""
    return Pieces.load(table, DEMO / "card.yaml")


@cache
def _sprite(pieces: Pieces, name: str, colour: str | None, side: int) -> PillowImage.Image:
    return pieces.sprite(name, colour, side)
