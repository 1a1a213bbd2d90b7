"""Shards and cards whose bytes depend on their samples alone: no clocks, no users, no machine names.

samples ──cut by count──▶ {name}-0000.tar, {name}-0001.tar, …   in a folder that then replaces the earlier build

How a build replaces the earlier one without ever mixing the two: `mm.data.sources.staging`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from webdataset.writer import TarWriter

from mm import configure
from mm.data.card import Card
from mm.media import BrokenMedia
from mm.sample import BrokenSample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """One sample of a shard: `key` names it, `fields` maps extensions (``webp``, ``txt``, ``json``) to contents.

    Bytes are written as they are, text as UTF-8, and anything under a ``json`` extension as compact JSON.
    """

    key: str
    fields: Mapping[str, Any]


class BuildError(ValueError):
    """A build that cannot be made of what was given; the message says why. What was built before stays."""


class Unusable(BrokenSample):
    """A file or record that is left out. The message up to its first colon is the reason that it is counted under."""


@dataclass(slots=True)
class Skips:
    """Counts of what a build leaves out, by reason, with the first example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: object) -> None:
        """Count one, which is called `example`."""
        self.counts[reason] += 1
        text = str(example)
        self.examples.setdefault(reason, (text if text.isprintable() else ascii(text))[:_EXAMPLE])

    def add_broken(self, error: BrokenSample, place: object) -> None:
        """Count what `error` was raised for. What follows its first colon differs from case to case."""
        reason, _, detail = str(error).partition(": ")
        self.add(reason, f"{place}: {detail}" if detail and not isinstance(error, BrokenMedia) else place)

    def lines(self, most: int = 20) -> list[str]:
        """A line a reason, the most frequent ones first."""
        lines = [
            f"{count:,} × {reason}, such as {self.examples[reason]}" for reason, count in self.counts.most_common(most)
        ]
        if rest := self.counts.total() - sum(count for _, count in self.counts.most_common(most)):
            lines.append(f"{rest:,} for {len(self.counts) - most:,} other reasons")
        return lines

    def __str__(self) -> str:
        return "; ".join(self.lines(5)) or "nothing"


_EXAMPLE = 160
"""Characters of an example at most."""


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a build: samples per split, and what it left out."""

    samples: dict[str, int]
    skips: Skips = field(default_factory=Skips)

    @property
    def skipped(self) -> Counter[str]:
        """How often something was left out, by reason."""
        return self.skips.counts


def rank(*names: object) -> int:
    """A 64-bit number that depends on the names alone: the way to shuffle and to choose that is the same everywhere.

    Python's `hash` changes with the process and `random` may change with the version; BLAKE2b does neither.
    """
    text = "\x1f".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str, validation: float) -> str:
    """``train``, or ``validation`` for that share of all keys.

    Raises:
        BuildError: no share.
    """
    if not 0 <= validation <= 1:
        raise BuildError(f"validation={validation}, expected a share from 0 to 1")
    return "validation" if rank("split", key) < validation * 2**64 else "train"


def write_shards(members: Iterable[Member], folder: Path, name: str, samples_per_shard: int) -> int:
    """Number of samples written to the shards ``{name}-{0000…}.tar`` of a folder that `staged` gave.

    Raises:
        BuildError: two samples of one shard have the same key, which readers would merge into one.
    """
    chunks = enumerate(_chunks(members, samples_per_shard))
    return sum(write_shard(chunk, shard_path(folder, name, number)) for number, chunk in chunks)


def write_lines(records: Iterable[Mapping[str, Any]], folder: Path, name: str, samples_per_shard: int) -> int:
    """Number of records written to ``{name}-{0000…}.jsonl``, in the way of `write_shards`: text needs no archive."""
    samples = 0
    for number, chunk in enumerate(_chunks(records, samples_per_shard)):
        with _synced(shard_path(folder, name, number, "jsonl")) as stream:
            for record in chunk:
                stream.write(encode("json", record) + b"\n")
                samples += 1
    return samples


def shard_path(folder: Path, name: str, number: int, extension: str = "tar") -> Path:
    """Where the shard of that number lies."""
    return folder / f"{name}-{number:04d}.{extension}"


def write_shard(members: Iterable[Member], path: Path) -> int:
    """Number of samples written to the shard.

    Raises:
        BuildError: two samples have the same key, which readers would merge into one.
    """
    keys: set[str] = set()
    with _synced(path) as stream, TarWriter(stream, user="mm", group="mm", mtime=0, encoder=False) as tar:
        for member in members:
            if member.key in keys:
                raise BuildError(f"{path.name}: two samples have the key {member.key!r}; keys must differ in a shard")
            keys.add(member.key)
            fields = {extension: encode(extension, value) for extension, value in member.fields.items()}
            tar.write({"__key__": member.key, **fields})
    return len(keys)


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a data card, see `mm.data.card`; where it names no format, ``format: webdataset`` is added.

    Where its ``splits`` are a list of names, the shards of a split are those next to the card that bear its name.

    Raises:
        CardError: it could not be read, such as one with an empty licence.
    """
    splits = card["splits"]
    if not isinstance(splits, Mapping):
        splits = {split: {"shards": [f"{split}-*.tar"]} for split in splits}
    text = configure.write_yaml({**card, "format": card.get("format", "webdataset"), "splits": splits})
    with _synced(path) as stream:
        stream.write(text.encode())
    Card.load(path)


def printable_name(*names: str) -> str:
    """The first name that is not empty, with escapes for bytes of a file's name that are no text."""
    return next(filter(None, names)).encode("utf-8", "backslashreplace").decode()


def encode(extension: str, value: Any) -> bytes:
    """The bytes of a field as a shard holds them, see `Member`."""
    if isinstance(value, bytes):
        return value
    if extension.endswith("json"):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return str(value).encode()


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk when the block ends, so that a full disk is noticed before it replaces another."""
    with path.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _chunks(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """The items, `size` at a time. A chunk must be used up before the next one is asked for."""
    if size < 1:
        raise BuildError(f"samples_per_shard={size}, expected 1 or more")
    stream = iter(items)
    for first in stream:
        yield chain((first,), islice(stream, size - 1))
