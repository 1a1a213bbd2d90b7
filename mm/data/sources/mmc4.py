"""Shards from documents in MMC4's form and the folder that their pictures were downloaded to.

    {"text_list": ["…", "…"], "image_info": [{"image_name": "b1.jpg", "matched_text_index": 1, …}], …}     one a line

Every document becomes one sample: its JSON and its pictures, ``0.img``, ``1.img``, … in the order of ``image_info``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.data.hidden import is_hidden
from mm.data.shards import MAX_RECORD
from mm.data.sources.folder import Folder
from mm.data.sources.records import Found, read_records
from mm.data.sources.staging import staged
from mm.data.sources.verify import CardCheck
from mm.data.sources.writer import (
    BuildError,
    Member,
    Report,
    Skips,
    Unusable,
    printable_name,
    split_of,
    write_card,
    write_shards,
)
from mm.media import facts
from mm.sample import BrokenSample, Image
from mm.terminal import Progress

SAMPLE = {"texts": "json.text_list", "images": "json.image_info", "at": "matched_text_index", "numbered": "img"}
"""The card's mapping. Pictures have one extension, whatever their format, since the mapping names its fields."""

SPLITS = ("train", "validation")


def build(
    out: Path,
    source: Path,
    images: Path,
    missing: str = "error",
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
    follow_links: bool = False,
) -> Report:
    """Write documents in the order of the files, pictures as they are.

    Documents that cannot be used are left out and counted by reason.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: the ``.jsonl`` file, or a folder of them.
        images: folder with the files that ``image_name`` names.
        missing: ``error`` leaves out a document with a picture that is not there or broken, ``drop`` only the picture.
        validation: share of the samples that are kept for validation, chosen by their place in the files.
        samples_per_shard: where shards are cut.
        licence: of pictures and words, for the card.
        name: of the dataset, for the card; by default that of the file or folder.
        follow_links: read also what links lead to that is not in the folder of pictures.

    Raises:
        FileNotFoundError: the files or the folder are not there.
        BuildError: `missing` is neither, or no document can be used.
    """
    if missing not in ("error", "drop"):
        raise BuildError(f"missing={missing!r}, allowed are error, drop")
    pages = _Pages(Folder(images, follow_links), missing == "drop")
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    for file in [file for file in files if is_hidden(file.name)]:
        pages.skips.add("a hidden file or folder", file)
        files.remove(file)
    if not files or not files[0].exists():
        raise FileNotFoundError(f"no .jsonl file at {source}; MMC4's .jsonl.zip files are to be unzipped first")
    with staged(out, SPLITS) as stage:
        samples = {
            split: write_shards(_members(files, pages, split, validation), stage, split, samples_per_shard)
            for split in SPLITS
        }
        if not sum(samples.values()):
            raise BuildError(f"{source}: no document could be used; left out: {pages.skips}")
        card = {
            "name": printable_name(name, source.stem, source.resolve().name, "mmc4"),
            "licence": licence,
            "origin": f"documents of {printable_name(source.name, source.resolve().name, '/')}",
        }
        splits = [split for split, count in samples.items() if count]
        write_card(stage / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, pages.skips)


def _members(files: Sequence[Path], pages: _Pages, split: str, validation: float) -> Iterator[Member]:
    """The samples of a split. A document's key is its number, counted through all files."""
    number = 0
    with Progress() as progress:
        bar = progress.add_task(split, total=sum(file.stat().st_size for file in files))
        for file in files:
            for found in read_records(file):
                key = f"{number:08d}"
                number += 1
                progress.advance(bar, found.size)
                if split_of(key, validation) == split and (fields := pages.fields(found, file)):
                    yield Member(key, fields)


class _Pages:
    """Documents with their pictures, and what was left out.

    Args:
        images: folder with the pictures.
        drop: leave out a picture that cannot be used, not its document.
    """

    def __init__(self, images: Folder, drop: bool) -> None:
        self.skips = Skips()
        self._images = images
        self._drop = drop
        self._check = CardCheck(SAMPLE)

    def fields(self, found: Found, file: Path) -> dict[str, bytes] | None:
        """The fields of a document's sample, None if it is left out."""
        where = f"{file.name}, {found.where}"
        try:
            if found.record is None:
                raise Unusable(str(found.error))
            return self._check.fields(self._with_pictures(found.record, where))
        except BrokenSample as reason:
            self.skips.add_broken(reason, where)
            return None

    def _with_pictures(self, document: dict[str, Any], where: str) -> dict[str, Any]:
        entries = document.get("image_info")
        if not isinstance(entries, list):
            raise Unusable("no list of image_info")
        kept: list[Any] = []
        pictures: dict[str, bytes] = {}
        room = MAX_RECORD
        for entry in entries:
            name = entry.get("image_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise Unusable("a picture without image_name")
            place = self._images.inside(name)
            try:
                picture = self._images.read(place, room)
                facts(Image(picture))
            except BrokenSample as reason:
                if not self._drop:
                    raise
                self.skips.add(f"{str(reason).partition(':')[0]} (the document is kept)", f"{where}: {place}")
                continue
            pictures[f"{len(kept)}.img"] = picture
            kept.append(entry)
            room -= len(picture)
        return pictures | {"json": document | {"image_info": kept}}
