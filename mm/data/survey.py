"""A survey: one pass over a shard that decodes everything in it, for `mm data check`.

shard ──scan──▶ Record ──card──▶ Sample ──decode every medium──▶ counts, digests, perceptual hashes
                                    └─ broken ──▶ key and reason
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from mm import media
from mm.data.card import Card
from mm.data.mapping import reading_a_record
from mm.data.passes import PassError, end_with_parent
from mm.data.shards import Scanned, ShardChanged, ShardError
from mm.data.sources.splits import colours_of
from mm.media import BrokenMedia, Waveform
from mm.sample import BrokenSample, MediaPart, Modality, Sample, Text, encodable, encodable_key
from mm.terminal import Progress

EXAMPLES = 20
"""Keys that are kept for each kind of problem of a shard."""

_POLL = 0.2  # seconds between looks at the counter


class Broken(NamedTuple):
    """A kind of problem in a shard: how many records have it, and the (key, reason) of the first ones."""

    count: int
    examples: list[tuple[str, str]]


@dataclass
class Survey:
    """What a pass over one shard found, for n sound samples, m media and p pictures.

    unreadable: why the shard as a whole cannot be read, or None
    keys: of the samples
    samples: (n,) uint64 digests of all parts; texts: (n,) of the words alone, 0 without any
    media: (m,) uint64 digests; owners: (m,) int64 sample of each; modalities: (m,) int8
    sizes: (m,) float64 pixels of a picture, seconds of a recording, points of a cloud
    pictures: (p,) int64 number of each picture in `media`
    hashes: (p,) uint64 perceptual hashes; colours: (p, 16, 16, 3) uint8 thumbnails
    characters: of all text, the mean over the card's choices
    """

    unreadable: str | None
    keys: list[str]
    samples: np.ndarray
    texts: np.ndarray
    media: np.ndarray
    owners: np.ndarray
    modalities: np.ndarray
    sizes: np.ndarray
    pictures: np.ndarray
    hashes: np.ndarray
    colours: np.ndarray
    characters: int
    broken: dict[str, Broken]


_counter: Any = None  # samples seen by all processes, shared; set in each by `_begin`


def survey_shards(card: Card, shards: Sequence[str], processes: int, progress: bool = True) -> dict[str, Survey]:
    """A survey of every shard, in parallel processes (0: in this one), with a bar that counts shards and samples.

    Raises:
        PassError: a process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    counter = spawn.Value("q", 0)
    executor: Executor = (
        ProcessPoolExecutor(min(processes, len(shards)), spawn, _begin, (counter,))
        if processes and shards
        else ThreadPoolExecutor(1, initializer=_begin, initargs=(counter,))
    )
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        "shards, {task.fields[samples]:,} samples",
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, disable=not progress, transient=True)
    with executor as pool, bar:
        task = bar.add_task(f"checking {card.name}", total=len(shards), samples=0)
        pending: set[Future[Survey]] = set()
        futures = {pool.submit(survey, card, shard): shard for shard in shards}
        pending |= futures.keys()
        try:
            while pending:
                _, pending = wait(pending, _POLL, FIRST_COMPLETED)
                bar.update(task, completed=len(futures) - len(pending), samples=counter.value)
            return {shard: future.result() for future, shard in futures.items()}
        except BrokenProcessPool as error:
            raise PassError("a process was killed, perhaps for memory; try fewer --processes") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(counter: Any) -> None:
    global _counter
    _counter = counter
    end_with_parent()


def survey(card: Card, shard: str) -> Survey:
    """One pass over a shard. A disk or a network that fails makes the shard unreadable and ends nothing else."""
    notes = _Notes(card)
    unreadable = None
    try:
        opened = card.open(shard, card.stat(shard))
        for scanned in opened.scan():
            notes.add(scanned)
            if _counter is not None:
                with _counter.get_lock():
                    _counter.value += 1
        opened.check()
        opened.close()
    except (OSError, ShardError, ShardChanged) as error:
        unreadable = f"{type(error).__name__}: {error}"
    return notes.survey(unreadable)


@dataclass
class _Notes:
    """What a pass has seen so far."""

    card: Card
    keys: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    media: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    modalities: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    colours: list[np.ndarray] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    characters: float = 0.0
    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, scanned: Scanned) -> None:
        if scanned.record is None:
            self._refuse(scanned.key, scanned.error or "no record")
            return
        try:
            samples = [self.card.sample(scanned.record, choice) for choice in range(len(self.card.choices))]
            with reading_a_record():
                items = [_surveyed(part) for part in samples[0].media]
        except BrokenMedia as broken:
            self._refuse(scanned.key, f"broken media: {broken}")
        except BrokenSample as broken:
            self._refuse(scanned.key, str(broken))
        else:
            self._count(samples, items)

    def _refuse(self, key: str, reason: str) -> None:
        reason = encodable(reason)
        kind = reason.partition(":")[0]
        self.broken[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append((encodable_key(key), reason))

    def _count(self, samples: list[Sample], items: list[_Item]) -> None:
        number = len(self.keys)
        words = [[part.text for part in one.parts if isinstance(part, Text)] for one in samples]
        self.keys.append(samples[0].key)
        self.texts.append(_digest("\0".join(text for one in words for text in one).encode()) if any(words) else 0)
        for p, one in zip(self.card.choices, words, strict=True):
            self.characters += p * sum(map(len, one))
        for item in items:
            if item.looks is not None:
                self.pictures.append(len(self.media))
                self.hashes.append(item.looks[0])
                self.colours.append(item.looks[1])
            self.sizes.append(item.size)
            self.media.append(item.digest)
            self.owners.append(number)
            self.modalities.append(item.modality)
        self.samples.append(_digest(repr((self.texts[-1], [item.digest for item in items])).encode()))

    def survey(self, unreadable: str | None) -> Survey:
        return Survey(
            unreadable=unreadable,
            keys=self.keys,
            samples=np.array(self.samples, np.uint64),
            texts=np.array(self.texts, np.uint64),
            media=np.array(self.media, np.uint64),
            owners=np.array(self.owners, np.int64),
            modalities=np.array(self.modalities, np.int8),
            sizes=np.array(self.sizes, np.float64),
            pictures=np.array(self.pictures, np.int64),
            hashes=np.array(self.hashes, np.uint64),
            colours=np.stack(self.colours) if self.colours else np.empty((0, 16, 16, 3), np.uint8),
            characters=round(self.characters),
            broken={kind: Broken(count, self.examples[kind]) for kind, count in self.broken.items()},
        )


class _Item(NamedTuple):
    """What is kept of a medium of a sample. The pictures of a long page, all decoded, would fill the memory.

    digest: of the file
    size: as in `Survey.sizes`
    looks: perceptual hash and (16, 16, 3) colours of a picture
    """

    modality: Modality
    digest: int
    size: float
    looks: tuple[int, np.ndarray] | None = None


def _surveyed(part: MediaPart) -> _Item:
    """A file decoded, measured and forgotten.

    Raises:
        BrokenMedia: it cannot be decoded, or is not what its header says, on which a plan would rely.
    """
    facts, item = media.facts(part), media.decode(part)
    found = media.measure(item)
    if facts != found:
        raise BrokenMedia(f"decodes to {tuple(found)}, its header says {tuple(facts)}")
    digest = _digest(part.data)
    if isinstance(item, PillowImage.Image):
        looks = media.perceptual_hash(item), colours_of(item)
        return _Item(part.modality, digest, item.width * item.height, looks)
    return _Item(part.modality, digest, len(item.samples) / item.rate if isinstance(item, Waveform) else len(item))


def _digest(data: bytes) -> int:
    """64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
