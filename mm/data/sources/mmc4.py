"""Shards from documents in MMC4's form and the folder that their pictures were downloaded to.

    {"text_list": ["…", "…"], "image_info": [{"image_name": "b1.jpg", "matched_text_index": 1, …}], …}     one a line

Every document becomes one sample: its JSON and its pictures, ``0.img``, ``1.img``, … in the order of ``image_info``.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.data.jsonl import JsonlShard
from mm.data.mapping import parse_mapping
from mm.data.shards import LocalFile, Scanned
from mm.data.sources.writer import Member, Report, split_of, write_card, write_shards
from mm.media import BrokenMedia, facts
from mm.sample import BrokenSample, Image
from mm.terminal import Progress

SAMPLE = {"texts": "json.text_list", "images": "json.image_info", "at": "matched_text_index", "numbered": "img"}
"""The card's mapping. Pictures have one extension, whatever their format, since the mapping names its fields."""


def build(
    out: Path,
    source: Path,
    images: Path,
    missing: str = "error",
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
) -> Report:
    """What was written: documents in the order of the files, pictures as they are.

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

    Raises:
        FileNotFoundError: the files or the folder are not there.
        ValueError: `missing` is neither, or no document can be used.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"missing={missing!r}, allowed are error, drop")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder of images at {images}")
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no .jsonl file at {source}; MMC4's .jsonl.zip files are to be unzipped first")
    pages = _Pages(images.resolve(), missing == "drop")
    samples = {
        split: write_shards(_members(files, pages, split, validation), out, split, samples_per_shard)
        for split in ("train", "validation")
    }
    if not sum(samples.values()):
        raise ValueError(f"{source}: no document could be used; reasons: {dict(pages.skipped)}")
    splits = [split for split, count in samples.items() if count]
    card = {"name": name or source.stem, "licence": licence, "origin": f"documents of {source.name}"}
    write_card(out / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, pages.skipped)


def _members(files: Sequence[Path], pages: _Pages, split: str, validation: float) -> Iterator[Member]:
    """The samples of a split. A document's key is its number, counted through all files."""
    number = 0
    with Progress() as progress:
        bar = progress.add_task(split, total=sum(file.stat().st_size for file in files))
        for file in files:
            for scanned in JsonlShard(LocalFile(str(file))).scan():
                key = f"{number:08d}"
                number += 1
                progress.advance(bar, scanned.place[1] + 1)
                if split_of(key, validation) == split and (fields := pages.fields(scanned)):
                    yield Member(key, fields)


class _Missing(ValueError):
    """A picture that is not there; the message is the reason, the same for all."""


class _Pages:
    """Documents with their pictures, and the count of what was left out, by reason.

    Args:
        images: folder with the pictures, resolved.
        drop: leave out a picture that cannot be used, not its document.
    """

    def __init__(self, images: Path, drop: bool) -> None:
        self.skipped: Counter[str] = Counter()
        self._images = images
        self._drop = drop
        self._mapping = parse_mapping(SAMPLE)

    def fields(self, scanned: Scanned) -> dict[str, Any] | None:
        """The fields of a document's sample, None if it is left out."""
        try:
            if scanned.record is None:
                raise BrokenSample(str(scanned.error))
            fields = self._with_pictures(scanned.record.fields)
            self._mapping.parts(fields, 0)
        except (BrokenSample, _Missing) as reason:
            self.skipped[str(reason).partition(":")[0]] += 1
            return None
        return fields

    def _with_pictures(self, document: dict[str, Any]) -> dict[str, Any]:
        entries = document.get("image_info")
        if not isinstance(entries, list):
            raise BrokenSample("no list of image_info")
        kept, pictures = [], {}
        for entry in entries:
            try:
                picture = self._picture(entry)
            except (_Missing, BrokenMedia) as reason:
                if not self._drop:
                    raise
                self.skipped[f"{str(reason).partition(':')[0]} (the document is kept)"] += 1
                continue
            pictures[f"{len(kept)}.img"] = picture
            kept.append(entry)
        return pictures | {"json": document | {"image_info": kept}}

    def _picture(self, entry: Any) -> bytes:
        name = entry.get("image_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise BrokenSample("a picture without image_name")
        try:
            path = (self._images / name).resolve()
            found = path.is_file()
        except (ValueError, OSError) as error:  # no name of a file: a zero byte, half a surrogate pair, too long
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                raise
            raise _Missing("a picture is not there") from error
        if not path.is_relative_to(self._images):
            raise BrokenSample("the path of a picture leads out of the folder")
        if not found:
            raise _Missing("a picture is not there")
        data = path.read_bytes()
        facts(Image(data))
        return data
