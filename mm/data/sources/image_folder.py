"""Shards from any folder of pictures with their words beside them.

photos/dog.jpg  photos/dog.txt         a caption as text
photos/cat.png  photos/cat.json        or {"caption": …} with whatever else is known
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mm.data.sources.writer import Member, Report, split_of, write_card, write_shards
from mm.media import BrokenMedia, facts
from mm.sample import Image
from mm.terminal import track

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
WORDS = ("txt", "json")
SAMPLE = [{"image": list(PICTURES)}, {"text": ["txt", "json.caption", "json.text"]}]
"""The card's mapping: the picture, then its caption from wherever it stands."""


def build(
    out: Path,
    source: Path,
    validation: float = 0.02,
    samples_per_shard: int = 1000,
    licence: str = "unknown",
    name: str = "",
) -> Report:
    """What was written: files go into the shards as they are, in the order of their paths.

    Args:
        out: folder for the shards and ``card.yaml``.
        source: folder with pictures, at any depth.
        validation: share of the samples that are kept for validation, chosen by their keys.
        samples_per_shard: where shards are cut.
        licence: of the pictures and words, for the card.
        name: of the dataset, for the card; by default that of the folder.

    Raises:
        FileNotFoundError: no folder there, or no picture with words in it.
        ValueError: two files give samples of one name.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder at {source}")
    skipped: Counter[str] = Counter()
    pictures = _named(source)
    keys = {split: [key for key in pictures if split_of(key, validation) == split] for split in ("train", "validation")}
    samples = {
        split: write_shards(
            _members({key: pictures[key] for key in members}, split, skipped), out, split, samples_per_shard
        )
        for split, members in keys.items()
    }
    if not sum(samples.values()):
        raise FileNotFoundError(f"{source} holds no picture with a .txt or .json beside it; left out: {dict(skipped)}")
    splits = [split for split, count in samples.items() if count]
    card = {"name": name or source.resolve().name, "licence": licence, "origin": f"files of the folder {source.name}"}
    write_card(out / "card.yaml", card | {"splits": splits, "sample": SAMPLE})
    return Report(samples, skipped)


def _named(source: Path) -> dict[str, Path]:
    """Pictures by key: the path below `source`, without dots, since a WebDataset key ends at its first dot."""
    pictures: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix[1:].lower() in PICTURES:
            key = path.relative_to(source).with_suffix("").as_posix().replace("/", "-").replace(".", "_")
            if key in pictures:
                raise ValueError(f"{pictures[key]} and {path} would both be the sample {key!r}; rename one")
            pictures[key] = path
    return pictures


def _members(pictures: dict[str, Path], split: str, skipped: Counter[str]) -> Iterator[Member]:
    for key, path in track(pictures.items(), description=split):
        words = {kind: beside.read_bytes() for kind in WORDS if (beside := path.with_suffix(f".{kind}")).is_file()}
        data = path.read_bytes()
        if not words:
            skipped["no .txt and no .json beside the picture"] += 1
        elif (problem := _problem(data)) is not None:
            skipped[problem] += 1
        else:
            yield Member(key, {path.suffix[1:].lower(): data, **words})


def _problem(data: bytes) -> str | None:
    try:
        facts(Image(data))
    except BrokenMedia as error:
        return str(error)
    return None
