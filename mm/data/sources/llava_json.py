"""Shards from conversations in LLaVA's form and the folder of their pictures.

    [{"id": …, "image": "coco/1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}, …]

as one JSON array, or as JSON lines. Records without a picture are text-only chats and are kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.data.sources.writer import Member, Report, split_of, write_card, write_shards
from mm.media import BrokenMedia, facts
from mm.sample import Image
from mm.terminal import track

MARKER = "<image>"
MOST_IMAGES = 16
SAMPLE = {"chat": "json.conversations", "images": [f"{number}.img" for number in range(MOST_IMAGES)]}
"""The card's mapping. Pictures have one extension, whatever their format, since the mapping names its fields."""


def build(
    out: Path,
    source: Path,
    images: Path,
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
) -> Report:
    """What was written: conversations in the order of the file, pictures as they are.

    Records that cannot be used (a picture that is missing or broken, another number of markers than of pictures) are
    left out and counted by reason.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: the ``.json`` or ``.jsonl`` file.
        images: folder that the paths of the records start from.
        validation: share of the samples that are kept for validation, chosen by their place in the file.
        samples_per_shard: where shards are cut.
        licence: of pictures and words, for the card.
        name: of the dataset, for the card; by default that of the file.

    Raises:
        FileNotFoundError: the file or the folder is not there.
        ValueError: the file is not a list of records, or none of them can be used.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"no folder of images at {images}")
    records = {f"{number:08d}": record for number, record in enumerate(_read(source))}
    skipped: Counter[str] = Counter()
    samples = {}
    for split in ("train", "validation"):
        members = {key: record for key, record in records.items() if split_of(key, validation) == split}
        samples[split] = write_shards(_members(members, images, split, skipped), out, split, samples_per_shard)
    if not sum(samples.values()):
        raise ValueError(f"{source}: no record could be used; reasons: {dict(skipped)}")
    splits = [split for split, count in samples.items() if count]
    card = {"name": name or source.stem, "licence": licence, "origin": f"conversations of {source.name}"}
    write_card(out / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, skipped)


def _read(source: Path) -> list[Any]:
    text = source.read_text(encoding="utf-8")
    records = (
        [json.loads(line) for line in text.splitlines() if line] if source.suffix == ".jsonl" else json.loads(text)
    )
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of records, found a {type(records).__name__}")
    return records


class _Unusable(ValueError):
    """A record that is left out; the message is the reason, the same for all records with that fault."""


def _members(records: dict[str, Any], images: Path, split: str, skipped: Counter[str]) -> Iterator[Member]:
    root = images.resolve()
    for key, record in track(records.items(), description=split):
        try:
            yield Member(key, _fields(record, root))
        except (_Unusable, BrokenMedia) as reason:
            skipped[str(reason)] += 1


def _fields(record: Any, root: Path) -> dict[str, Any]:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise _Unusable("no list of conversations")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    markers = sum(
        str(turn.get("value", "")).count(MARKER) for turn in record["conversations"] if isinstance(turn, dict)
    )
    if markers != len(names):
        raise _Unusable("markers and pictures differ in number")
    if len(names) > MOST_IMAGES:
        raise _Unusable(f"more than {MOST_IMAGES} pictures")
    return {f"{number}.img": data for number, data in enumerate(_pictures(names, root))} | {"json": record}


def _pictures(names: Sequence[str], root: Path) -> Iterator[bytes]:
    for name in names:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise _Unusable("the path of a picture leads out of the folder")
        if not path.is_file():
            raise _Unusable("the picture is not there")
        data = path.read_bytes()
        facts(Image(data))
        yield data
