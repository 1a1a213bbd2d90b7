"""Shards from conversations in LLaVA's form and the folder of their pictures.

    [{"id": …, "image": "coco/1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}, …]

as one JSON array, or as JSON lines. Records without a picture are text-only chats and are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
from mm.sample import BrokenSample
from mm.terminal import track

MOST_IMAGES = 16
SAMPLE = {"chat": "json.conversations", "images": [f"{number}.img" for number in range(MOST_IMAGES)]}
"""The card's mapping. Pictures have one extension, whatever their format, since the mapping names its fields."""
SPLITS = ("train", "validation")
NOT_READ = ("images", "image_path", "image_paths", "video", "videos", "audio", "audios")
"""Keys under which other forms name files. Without them a record would be another sample, with the same words."""


def build(
    out: Path,
    source: Path,
    images: Path,
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
    follow_links: bool = False,
) -> Report:
    """Write conversations in the order of the file, pictures as they are.

    Records that cannot be used (a picture that is missing or broken, another number of markers than of pictures, turns
    that are no chat) are left out and counted by reason.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: the ``.json`` or ``.jsonl`` file.
        images: folder that the paths of the records start from.
        validation: share of the samples that are kept for validation, chosen by their place in the file.
        samples_per_shard: where shards are cut.
        licence: of pictures and words, for the card.
        name: of the dataset, for the card; by default that of the file.
        follow_links: read also what links lead to that is not in the folder of pictures.

    Raises:
        FileNotFoundError: the file or the folder is not there.
        BuildError: the file is no list of records, or none of them can be used.
    """
    folder, skips = Folder(images, follow_links), Skips()
    records = sum(1 for _ in read_records(source))  # an error at the end of a list is found before pictures are read
    with staged(out, SPLITS) as stage:
        samples = {}
        for split in SPLITS:
            found = track(read_records(source), description=split, total=records)
            numbered = ((f"{number:08d}", record) for number, record in enumerate(found))
            of_split = ((key, record) for key, record in numbered if split_of(key, validation) == split)
            samples[split] = write_shards(_members(of_split, folder, skips), stage, split, samples_per_shard)
        if not sum(samples.values()):
            raise BuildError(f"{source}: none of {records:,} records could be used; left out: {skips}")
        card = {
            "name": printable_name(name, source.stem),
            "licence": licence,
            "origin": f"conversations of {printable_name(source.name)}",
        }
        splits = [split for split, count in samples.items() if count]
        write_card(stage / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, skips)


def _members(records: Iterable[tuple[str, Found]], folder: Folder, skips: Skips) -> Iterator[Member]:
    check = CardCheck(SAMPLE)
    for key, found in records:
        try:
            if found.record is None:
                raise Unusable(str(found.error))
            fields = check.fields(_fields(found.record, folder))
        except BrokenSample as reason:
            skips.add_broken(reason, found.where)
        else:
            yield Member(key, fields)


def _fields(record: dict[str, Any], folder: Folder) -> dict[str, Any]:
    if not isinstance(record.get("conversations"), list):
        raise Unusable("no list of conversations")
    if named := [key for key in NOT_READ if record.get(key) and isinstance(record[key], str | list)]:
        raise Unusable(f"files under another key than `image`: {', '.join(named)}")
    pictures: dict[str, bytes] = {}
    room = MAX_RECORD
    for number, name in enumerate(_names(record.get("image"))):
        try:
            picture = folder.read(folder.inside(name), room)
        except Unusable as reason:
            raise Unusable(f"{reason}: {name}") from reason
        pictures[f"{number}.img"] = picture
        room -= len(picture)
    return pictures | {"json": record}


def _names(image: Any) -> list[str]:
    """The names of a record's pictures; null and the empty text are none."""
    names = [] if image is None or image == "" else image if isinstance(image, list) else [image]
    if len(names) > MOST_IMAGES:
        raise Unusable(f"more than {MOST_IMAGES} pictures")
    for name in names:
        if not isinstance(name, str):
            kind = "null" if name is None else type(name).__name__
            raise Unusable(f"the name of a picture is no text: {kind}")
    return names
