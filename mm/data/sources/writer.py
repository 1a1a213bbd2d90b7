"""Shards and cards whose bytes depend on their samples alone: no clocks, no users, no machine names.

samples ──cut by count──▶ {name}-0000.tar, {name}-0001.tar, …   each written beside its place, then renamed
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from webdataset.writer import TarWriter

from mm import configure

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """One sample of a shard: `key` names it, `fields` maps extensions (``webp``, ``txt``, ``json``) to contents.

    Bytes are written as they are, text as UTF-8, and anything under a ``json`` extension as compact JSON.
    """

    key: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What a build wrote: samples per split, and how many records it left out for which reason."""

    samples: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)


def rank(*names: object) -> int:
    """A 64-bit number that depends on the names alone: the way to shuffle and to choose that is the same everywhere.

    Python's `hash` changes with the process and `random` may change with the version; BLAKE2b does neither.
    """
    text = "\x1f".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str, validation: float) -> str:
    """``train``, or ``validation`` for that share of all keys."""
    return "validation" if rank("split", key) < validation * 2**64 else "train"


def write_shards(members: Iterable[Member], folder: Path, name: str, samples_per_shard: int) -> int:
    """Number of samples written to the shards ``{name}-{0000…}.tar`` of `folder`.

    A shard appears under its name only when it is complete, so an interrupted build leaves nothing half-written; shards
    of that name from an earlier build are removed first.

    Raises:
        ValueError: two samples of one shard have the same key, which readers would merge into one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_shards(folder, name)
    chunks = enumerate(_chunks(members, samples_per_shard))
    return sum(write_shard(chunk, shard_path(folder, name, number)) for number, chunk in chunks)


def write_lines(records: Iterable[Mapping[str, Any]], folder: Path, name: str, samples_per_shard: int) -> int:
    """Number of records written to ``{name}-{0000…}.jsonl``, in the way of `write_shards`: text needs no archive."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_shards(folder, name, "jsonl")
    samples = 0
    for number, chunk in enumerate(_chunks(records, samples_per_shard)):
        path = shard_path(folder, name, number, "jsonl")
        unfinished = path.with_suffix(".jsonl.part")
        unfinished.write_bytes(b"".join(_encode("json", record) + b"\n" for record in chunk))
        unfinished.replace(path)
        samples += len(chunk)
    return samples


def shard_path(folder: Path, name: str, number: int, extension: str = "tar") -> Path:
    """Where the shard of that number lies."""
    return folder / f"{name}-{number:04d}.{extension}"


def remove_shards(folder: Path, name: str, extension: str = "tar") -> None:
    """Removes the shards of that name, so that none of an earlier, longer build is left among the new ones."""
    for old in folder.glob(f"{name}-[0-9][0-9][0-9][0-9].{extension}"):
        old.unlink()


def write_shard(members: Iterable[Member], path: Path) -> int:
    """Number of samples written to the shard, which appears under its name when it is complete.

    Raises:
        ValueError: two samples have the same key, which readers would merge into one.
    """
    unfinished = path.with_suffix(".tar.part")
    samples = _write_members(members, unfinished, path.name)
    unfinished.replace(path)
    return samples


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Writes a data card, see `mm.data.card`; where it names no format, ``format: webdataset`` is added.

    Where its ``splits`` are a list of names, the shards of a split are those beside the card that bear its name.
    """
    splits = card["splits"]
    if not isinstance(splits, Mapping):
        splits = {split: {"shards": [f"{split}-*.tar"]} for split in splits}
    text = configure.write_yaml({**card, "format": card.get("format", "webdataset"), "splits": splits})
    path.write_text(text, encoding="utf-8")


def _write_members(members: Iterable[Member], path: Path, name: str) -> int:
    keys: set[str] = set()
    with path.open("wb") as stream, TarWriter(stream, user="mm", group="mm", mtime=0, encoder=False) as tar:
        for member in members:
            if member.key in keys:
                raise ValueError(f"{name}: two samples have the key {member.key!r}; keys must differ in a shard")
            keys.add(member.key)
            fields = {extension: _encode(extension, value) for extension, value in member.fields.items()}
            tar.write({"__key__": member.key, **fields})
    return len(keys)


def _encode(extension: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if extension.endswith("json"):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return str(value).encode()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk
