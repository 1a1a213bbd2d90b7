"""Shards from any folder of pictures with their words next to them.

photos/dog.jpg  photos/dog.txt         a caption as text
photos/cat.png  photos/cat.json        or {"caption": …} with whatever else is known

Words are looked for as ``dog.txt``, ``dog.TXT``, ``dog.jpg.txt``, in this order, and ``.json`` likewise. Whatever is in
the folder and does not become part of a sample is counted, with its reason.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mm.data.sources.folder import Folder
from mm.data.sources.staging import staged
from mm.data.sources.verify import CardCheck
from mm.data.sources.writer import (
    Member,
    Report,
    Skips,
    Unusable,
    printable_name,
    split_of,
    write_card,
    write_shards,
)
from mm.sample import BrokenSample
from mm.terminal import track

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
FIELDS = {
    **{kind: kind for kind in PICTURES},
    **dict.fromkeys(("jpe", "jfif", "jfi", "jif", "pjpeg", "pjp", "mpo"), "jpg"),
    "apng": "png",
    "dib": "bmp",
}
"""Extensions of picture files, and the field that holds them in a shard. Their case does not matter."""
WORDS = ("txt", "json")
SAMPLE = [{"image": list(PICTURES)}, {"text": ["txt", "json.caption", "json.text"]}]
"""The card's mapping: the picture, then its caption from wherever it is."""
SPLITS = ("train", "validation")


class Pair(NamedTuple):
    """A picture, and the files with its words by kind."""

    picture: PurePosixPath
    words: dict[str, PurePosixPath]

    @property
    def key(self) -> str:
        """The path without dots, since a WebDataset key ends at its first dot."""
        return printable_name(self.picture.with_suffix("").as_posix().replace("/", "-").replace(".", "_"))


def build(
    out: Path,
    source: Path,
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
    follow_links: bool = False,
) -> Report:
    """Write the files into shards as they are, in the order of their paths.

    Of pictures that would be samples of one name, the first that can be used is.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: folder with pictures, at any depth.
        validation: share of the samples that are kept for validation, chosen by their keys.
        samples_per_shard: where shards are cut.
        licence: of the pictures and words, for the card.
        name: of the dataset, for the card; by default that of the folder.
        follow_links: read also what links lead to that is not in the folder.

    Raises:
        FileNotFoundError: no folder there, or no picture with words in it.
    """
    folder, skips = Folder(source, follow_links), Skips()
    pairs = _pairs(folder.files(skips), skips)
    of_split = {split: [pair for pair in pairs if split_of(pair.key, validation) == split] for split in SPLITS}
    with staged(out, SPLITS) as stage:
        samples = {
            split: write_shards(_members(folder, of_split[split], split, skips), stage, split, samples_per_shard)
            for split in SPLITS
        }
        if not sum(samples.values()):
            raise FileNotFoundError(f"{source} holds no picture with a .txt or .json next to it; left out: {skips}")
        card = {
            "name": printable_name(name, folder.root.name, "pictures"),
            "licence": licence,
            "origin": f"files of the folder {printable_name(source.name, folder.root.name, '/')}",
        }
        splits = [split for split, count in samples.items() if count]
        write_card(stage / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, skips)


def _pairs(files: Sequence[PurePosixPath], skips: Skips) -> list[Pair]:
    """The pictures with their words, in the order of the files. All other files are counted."""
    pictures = [file for file in files if _kind(file) in FIELDS]
    words: dict[tuple[PurePosixPath, str], list[PurePosixPath]] = defaultdict(list)
    for file in files:
        if _kind(file) in WORDS:
            words[_normal(file.parent / file.stem), _kind(file)].append(file)
        elif _kind(file) not in FIELDS:
            skips.add(f"type not read: {_shown(file)}", file)
    pairs, used = [], set()
    for picture in pictures:
        found = {}
        for kind, named in itertools.product(WORDS, (picture.parent / picture.stem, picture)):
            if candidates := words.get((_normal(named), kind)):
                found.setdefault(kind, min(candidates, key=lambda file: (file.suffix[1:] not in WORDS, file)))
        used.update(found.values())
        pairs.append(Pair(picture, found))
    for file in files:
        if _kind(file) in WORDS and file not in used:
            skips.add("words that belong to no picture, or to one that has others", file)
    return pairs


def _kind(file: PurePosixPath) -> str:
    return file.suffix[1:].lower()


def _normal(path: PurePosixPath) -> PurePosixPath:
    """The path with the extension of a picture in lower case: ``DOG.jpg.txt`` has the words of ``DOG.JPG``."""
    return path.with_suffix(path.suffix.lower()) if _kind(path) in FIELDS else path


def _shown(file: PurePosixPath) -> str:
    kind = _kind(file)
    return f".{kind}" if kind.isascii() and kind.isalnum() and len(kind) <= 8 else "no known extension"


def _members(folder: Folder, pairs: Sequence[Pair], split: str, skips: Skips) -> Iterator[Member]:
    check, taken = CardCheck(SAMPLE), set()
    for pair in track(pairs, description=split):
        try:
            if pair.key in taken:
                raise Unusable("another picture gives a sample of this name; rename one")
            fields = check.fields(_fields(folder, pair, skips))
        except BrokenSample as reason:
            skips.add_broken(reason, pair.picture)
        else:
            taken.add(pair.key)
            yield Member(pair.key, fields)


def _fields(folder: Folder, pair: Pair, skips: Skips) -> dict[str, bytes]:
    words = {}
    for kind, file in pair.words.items():
        try:
            words[kind] = folder.read(file)
        except Unusable as reason:
            skips.add_broken(reason, file)
    if not words:
        raise Unusable("no .txt and no .json next to the picture")
    return {FIELDS[_kind(pair.picture)]: folder.read(pair.picture), **words}
