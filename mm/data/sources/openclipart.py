"""The demo corpus: public-domain drawings from Debian's package openclipart-png, with curated captions.

    captions.tsv ─┐                      by (author, folder),
    package ──────┴──▶ drawings ─────────no near-duplicates──────▶ train, heldout: pictures with captions
             on white, ≤ 160 px                   across them      instruct: chats

The package is read as its ``.deb`` or as a folder that it was unpacked to. Which pictures are used, and what each is
called, stands in a table (`Caption`), because the package's own titles often name a theme, an author or nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageChops

from mm.data.sources.conversations import conversations
from mm.data.sources.debian import package_files
from mm.data.sources.splits import SPLITS, colours_of, split_by_group, without_near_duplicates
from mm.data.sources.staging import staged
from mm.data.sources.tables import read_table
from mm.data.sources.writer import BuildError, Member, Report, Skips, write_card, write_shards
from mm.media import BrokenMedia, decode, perceptual_hash
from mm.sample import Image
from mm.terminal import track

CAPTIONS = Path(__file__).parents[3] / "data_cards" / "demo" / "captions.tsv"
FOLDER_IN_PACKAGE = PurePosixPath("usr/share/openclipart/png")
HOW_TO_GET_IT = "`apt-get download openclipart-png` (Debian, 131 MB), then source=openclipart-png_….deb"
CARD = {
    "licence": "public domain (Open Clip Art Library, Public Domain Dedication), see LICENCE",
    "origin": "Debian package openclipart-png 1:0.18+dfsg-19, by `mm data build openclipart`, see README.md",
}


class Caption(NamedTuple):
    """A row of the table: what the picture shows, the noun that heads that phrase, and one of some 20 categories.

    Two captions with one head may both be true of a picture, so they never stand in one question.
    """

    file: str
    caption: str
    head: str
    category: str


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A picture as it goes into a shard (WebP), and what is known about it. `hash`, `colours`: see `splits.Grouped`."""

    about: Caption
    webp: bytes
    hash: int
    colours: np.ndarray
    title: str
    description: str
    author: str

    @property
    def caption(self) -> str:
        return self.about.caption

    @property
    def head(self) -> str:
        return self.about.head

    @property
    def category(self) -> str:
        return self.about.category

    @property
    def group(self) -> str:
        """Author and folder: drawings of one series are near-duplicates."""
        return f"{identity(self.author)}/{PurePosixPath(self.about.file).parent}"

    @property
    def key(self) -> str:
        """The file's path as a name; a WebDataset key ends at its first dot."""
        return self.about.file.removesuffix(".png").replace("/", "-").replace(".", "_")

    @property
    def record(self) -> dict[str, str]:
        known = {"title": self.title, "description": self.description, "author": self.author, "group": self.group}
        return self.about._asdict() | known


def build(
    out: Path,
    source: Path,
    captions: Path = CAPTIONS,
    side: int = 160,
    quality: int = 60,
    seed: int = 0,
    samples_per_shard: int = 500,
) -> Report:
    """Write shards of all splits, ``card.yaml`` for captions and ``instruct.yaml`` for chats.

    Args:
        out: folder for shards and cards.
        source: the package's ``.deb``, the folder it was unpacked to, or its folder of pictures.
        captions: the table; columns file, caption, head, category.
        side: longest side of a picture in pixels.
        quality: of the lossy WebP, 0 to 100.
        seed: of the splits and the questions.
        samples_per_shard: where shards are cut.

    Raises:
        FileNotFoundError: the package is not there, or lacks pictures; says how to get it.
        BuildError: a picture of the table cannot be decoded, or a faulty table.
    """
    table = read_captions(captions)
    try:
        files = package_files(source, FOLDER_IN_PACKAGE, {row.file for row in table})
        drawings = list(_drawings(table, files, side, quality))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. How to get the package: {HOW_TO_GET_IT}") from error
    drawings.sort(key=lambda drawing: drawing.about.file)
    splits = without_near_duplicates(split_by_group(drawings, seed))
    members: dict[str, list[Member]] = {split: [_captioned(drawing) for drawing in splits[split]] for split in SPLITS}
    members["instruct"] = list(conversations(splits["instruct"], seed))
    with staged(out, SPLITS, ("card.yaml", "instruct.yaml")) as stage:
        samples = {split: write_shards(members[split], stage, split, samples_per_shard) for split in SPLITS}
        write_cards(stage, splits, samples)
    skips, kept = Skips(), {drawing.key for of_split in splits.values() for drawing in of_split}
    for drawing in drawings:
        if drawing.key not in kept:
            skips.add("resembles a picture of another split", drawing.about.file)
    return Report(samples, skips)


CAPTIONED = ["train", "validation", "heldout"]


def write_cards(out: Path, splits: Mapping[str, Sequence[Drawing]], samples: Mapping[str, int]) -> None:
    """The cards of the corpus: a card has one way to make a sample of a record, and chats are not captions."""
    pairs = {
        "name": "demo",
        "description": "Drawings with captions that were checked by eye.",
        **CARD,
        "splits": CAPTIONED,
        "sample": [{"image": "webp"}, {"text": "json.caption"}],
        "statistics": {split: _statistics(splits[split], samples[split]) for split in CAPTIONED},
    }
    chats = {
        "name": "demo-instruct",
        "description": "Chats about drawings: descriptions, lettered choices, categories, yes or no, two pictures.",
        **CARD,
        "splits": {"train": {"shards": ["instruct-*.tar"]}},
        "sample": {"chat": "json.conversations", "images": ["webp", "0.webp", "1.webp"]},
        "statistics": {"train": _statistics(splits["instruct"], samples["instruct"])},
    }
    write_card(out / "card.yaml", pairs)
    write_card(out / "instruct.yaml", chats)


def _statistics(drawings: Sequence[Drawing], samples: int) -> dict[str, object]:
    categories = Counter(drawing.category for drawing in drawings)
    return {"samples": samples, "pictures": len(drawings), "categories": dict(sorted(categories.items()))}


def _captioned(drawing: Drawing) -> Member:
    return Member(drawing.key, {"webp": drawing.webp, "json": drawing.record})


def read_captions(path: Path) -> list[Caption]:
    """The rows of a table of captions.

    Raises:
        FileNotFoundError: no table there.
        BuildError: another header, a row with an empty column, or a file that is named twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table of captions at {path}; the repository has it in data_cards/demo")
    rows = [Caption(*line) for line in read_table(path, Caption._fields)]
    if repeated := [file for file, times in Counter(row.file for row in rows).items() if times > 1]:
        raise BuildError(f"{path} names {len(repeated)} files twice, such as {repeated[0]}")
    return rows


def _drawings(
    table: Sequence[Caption], files: Iterator[tuple[str, bytes]], side: int, quality: int
) -> Iterator[Drawing]:
    about = {row.file: row for row in table}
    for name, data in track(files, description="drawings", total=len(table)):
        try:
            picture = trimmed(cast(PillowImage.Image, decode(Image(data))), side)
        except BrokenMedia as error:
            raise BuildError(f"{name}: {error}; the package is damaged, or another version") from error
        known = png_texts(data)
        yield Drawing(
            about[name],
            webp=to_webp(picture, quality),
            hash=perceptual_hash(picture),
            colours=colours_of(picture),
            title=known.get("Title", ""),
            description=known.get("Description", ""),
            author=known.get("Author", ""),
        )


def trimmed(picture: PillowImage.Image, side: int) -> PillowImage.Image:
    """The picture without its white border, scaled down so that the longer side has at most `side` pixels.

    Many drawings cover a corner of an A4 page; without trimming they would be a few pixels large.
    """
    white = PillowImage.new("RGB", picture.size, "white")
    ink = ImageChops.difference(picture, white).point([255 * (value > 5) for value in range(256)] * 3)
    picture = picture.crop(ink.getbbox())
    picture.thumbnail((side, side), PillowImage.Resampling.LANCZOS, reducing_gap=None)
    return picture


def to_webp(picture: PillowImage.Image, quality: int) -> bytes:
    """The bytes of a lossy WebP. They depend on the version of libwebp that Pillow brings."""
    stream = BytesIO()
    picture.save(stream, "webp", quality=quality, method=6)
    return stream.getvalue()


def png_texts(data: bytes) -> dict[str, str]:
    """Textual metadata of a PNG file: Title, Author, Description, …

    Half of the package was written with UTF-8 in fields that PNG defines as Latin-1; those are put right.
    """
    with PillowImage.open(BytesIO(data), formats=["PNG"]) as picture:
        return {str(name): _as_utf8(value) for name, value in picture.info.items() if isinstance(value, str)}


def _as_utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def identity(author: str) -> str:
    """One spelling per person: ``Architetto Francesco Rollandin`` and ``Rollandin Francesco`` are the same."""
    ascii_name = unicodedata.normalize("NFKD", author).encode("ascii", "ignore").decode().lower()
    without_notes = re.sub(r"\(.*?\)|\[.*?\]|\S+@\S+|\barchitetto\b", " ", ascii_name)
    return "-".join(sorted(re.findall(r"[a-z0-9]+", without_notes))) or "unknown"
