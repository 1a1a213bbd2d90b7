"""The index: one row a sample, from one pass over the shards that decodes nothing.

    shard ──scan──▶ Record ──card──▶ Sample ──header──▶ row (key, place, characters, facts)     one file a shard
                                        └─ broken ──▶ error (key, place, reason)                in the same file

A file of the index holds the rows of its shard and, after them, the errors. It is stamped with the shard's fingerprint
and with the meaning of the card, written under a lock and renamed into place: a pass that is killed goes on where it
was, two processes that index at once share the work, and a shard or a card that changed is indexed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from mm import terminal
from mm.data.cache import Content, fetch_ahead
from mm.data.card import Card
from mm.data.passes import each_shard, read_stamp, write_table
from mm.data.scan import scan
from mm.data.shards import Shard, ShardChanged, ShardFingerprint, ShardStat
from mm.data.unread import Unread, total, unread_lines
from mm.media import Facts, ImageFacts, PointFacts, SpeechFacts
from mm.sample import Modality, Sample
from mm.terminal import printable

logger = terminal.logger(__name__)

INDEX_VERSION = 2
"""Raised when the files of an index change their form: they are built anew, and plans that were made before refused."""

OPEN_SHARDS = 64
"""Shards, and tables of places, that a process keeps open."""

_METADATA = b"mm.index"
_FACTS = {Modality.IMAGE: ImageFacts, Modality.SPEECH: SpeechFacts, Modality.POINT: PointFacts}


class IndexingError(RuntimeError):
    """A split that cannot be indexed."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What an index knows of one shard.

        shard: its path or URL; file: name of its file in the index folder
        rows, errors: numbers of samples, and of records that are none
        stat, fingerprint: of the shard when it was indexed; mapping: fingerprint of the card's record mapping
        dropped: number of files that records lack and their samples do without, see `RecordMapping.dropped`
        hidden: number of hidden files in it that were skipped, see `mm.data.hidden`
    unread: files of the records that no field of the card reads
    """

    shard: str
    file: str
    rows: int
    errors: int
    stat: ShardStat
    fingerprint: ShardFingerprint
    mapping: str
    dropped: int = 0
    hidden: int = 0
    unread: tuple[Unread, ...] = ()

    @property
    def stamp(self) -> str:
        """Identity of the rows: equal stamps mean the same samples in the same order. What columns are stamped with."""
        return _digest([INDEX_VERSION, self.fingerprint, self.mapping])

    @property
    def number(self) -> int:
        """A number of 32 bits for the stamp, not 0."""
        return int(self.stamp[:8], 16) or 1


class Index:
    """All samples of a split, in the order of the card's shards and of the records in them.

    Pickles small: arrays are loaded on first use, and workers that only call `sample` load the places of the shards
    that they touch.
    """

    def __init__(self, card: Card, split: str, folder: Path, shards: Sequence[ShardIndex]) -> None:
        self.card = card
        self.split = split
        self.folder = folder
        self.shards = tuple(shards)
        self.starts = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards])]).astype(np.int64)
        self._reader = _Reader(card, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.card, self.split, self.folder, self.shards)

    def __len__(self) -> int:
        return self.rows

    @property
    def rows(self) -> int:
        """Number of samples n."""
        return int(self.starts[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any row might mean another sample."""
        return _digest([shard.stamp for shard in self.shards])

    @cached_property
    def shard(self) -> np.ndarray:
        """(n,) int32 number of the shard of every row."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), np.diff(self.starts))

    @property
    def place(self) -> np.ndarray:
        """(n, 2) int64 place of every row in its shard, see `mm.data.shards`."""
        return self._arrays.place

    @property
    def characters(self) -> np.ndarray:
        """(n, choices) int32 length of all text of the sample under each choice of the card, in characters."""
        return self._arrays.characters

    @property
    def signature(self) -> np.ndarray:
        """(n,) uint64; rows of equal signature have equal media facts in equal order, 0 means no media.

        What follows from facts alone, such as numbers of slots, needs computing once a signature.
        """
        return self._arrays.signature

    @property
    def media_starts(self) -> np.ndarray:
        """(n + 1,) int64; the media of row i are rows ``media_starts[i]:media_starts[i + 1]`` of `media`."""
        return self._arrays.media_starts

    @property
    def media(self) -> np.ndarray:
        """(m, 3) int32: modality and the two facts of every media part, in part order."""
        return self._arrays.media

    @cached_property
    def key(self) -> pa.ChunkedArray:
        """(n,) strings: labels for people."""
        return self._table(["key"]).column("key")

    @cached_property
    def errors(self) -> pa.Table:
        """What is no sample: columns shard, key, reason."""
        tables = []
        for shard in self.shards:
            if shard.errors:
                table = _errors(self.folder, shard).rename_columns(["key", "reason"])
                tables.append(table.add_column(0, "shard", pa.repeat(pa.scalar(shard.shard), shard.errors)))
        empty = pa.schema([("shard", pa.string()), ("key", pa.string()), ("reason", pa.string())]).empty_table()
        return pa.concat_tables([empty, *tables])

    def facts(self, row: int) -> list[Facts]:
        """Header facts of a sample's media, in part order."""
        media = self.media[self.media_starts[row] : self.media_starts[row + 1]].tolist()
        return [_FACTS[modality](first, second) for modality, first, second in media]

    def sample(self, row: int, choice: int = 0) -> Sample:
        """Reads a sample under one of the card's choices.

        Raises:
            ShardChanged: the shard is not the one that was indexed.
            OSError: the disk or the network failed.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._reader.sample(self.shards[number], int(row - self.starts[number]), choice)

    def summary(self, most: int = 5) -> str:
        """Rows and errors in a few lines, the most frequent reasons first."""
        counts: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for shard, key, reason in zip(*(column.to_pylist() for column in self.errors.columns), strict=True):
            kind = reason.partition(":")[0]
            counts[kind] += 1
            examples.setdefault(kind, f"{printable(repr(key))} in {printable(shard, 1000)}: {printable(reason, 300)}")
        lines = [
            f"{printable(self.card.name)}/{printable(self.split)}: {self.rows} samples in {len(self.shards)} shards"
        ]
        lines += [f"  {count} x {printable(kind)}, first {examples[kind]}" for kind, count in counts.most_common(most)]
        if dropped := sum(shard.dropped for shard in self.shards):
            lines.append(f"  {dropped} pictures that were not in their records are left out of pages (`missing: drop`)")
        if hidden := sum(shard.hidden for shard in self.shards):
            lines.append(f"  {hidden} hidden files, or files in hidden folders, are skipped")
        lines += [f"  {line}" for line in unread_lines(self.unread)]
        return "\n".join(lines)

    @property
    def unread(self) -> list[Unread]:
        """Files of the records that no field of the card reads."""
        return total([shard.unread for shard in self.shards])

    @cached_property
    def _arrays(self) -> _Arrays:
        table = self._table(["place", "characters", "media", "signature"])
        media = _flat(table, "media")
        columns = [media.field(name).to_numpy(zero_copy_only=False) for name in ("modality", "first", "second")]
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table.column("media").chunks])
        return _Arrays(
            place=_flat(table, "place").to_numpy(zero_copy_only=False).reshape(-1, 2),
            characters=_flat(table, "characters").to_numpy(zero_copy_only=False).reshape(-1, len(self.card.choices)),
            signature=table.column("signature").to_numpy(),
            media_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            media=np.stack(columns, axis=1).astype(np.int32),
        )

    def _table(self, columns: list[str]) -> pa.Table:
        return pa.concat_tables([_rows(self.folder, shard, columns) for shard in self.shards])


class _Arrays(NamedTuple):
    place: np.ndarray
    characters: np.ndarray
    signature: np.ndarray
    media_starts: np.ndarray
    media: np.ndarray


def _flat(table: pa.Table, column: str) -> pa.Array:
    """The values of all lists of a column, one after another."""
    return pa.concat_arrays([chunk.flatten() for chunk in table.column(column).chunks])


class _Reader:
    """The shards that this process has open. A forked child starts with none: connections do not survive a fork."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.folder = card, folder
        self._process = os.getpid()
        self._open: OrderedDict[str, tuple[Shard, np.ndarray]] = OrderedDict()

    def sample(self, entry: ShardIndex, row: int, choice: int) -> Sample:
        """The sample of a row of a shard."""
        shard, places = self._get(entry)
        first, second = places[row].tolist()
        return self.card.sample(shard.read((first, second)), choice)

    def _get(self, entry: ShardIndex) -> tuple[Shard, np.ndarray]:
        """A shard, and the (rows, 2) places of its samples."""
        if self._process != os.getpid():
            self._process, self._open = os.getpid(), OrderedDict()
        if entry.file in self._open:
            self._open.move_to_end(entry.file)
            return self._open[entry.file]
        self._open[entry.file] = self.card.open(entry.shard, entry.stat), shard_places(self.folder, entry)
        if len(self._open) > OPEN_SHARDS:
            _, (oldest, _) = self._open.popitem(last=False)
            oldest.close()
        return self._open[entry.file]


class SplitSamples:
    """The samples of a split by shard and row in it, whatever is indexed of it by now.

    A shard that is not is indexed when a row of it is asked for. Pickles small, for loader workers.
    """

    def __init__(self, card: Card, split: str, folder: Path, shards: Sequence[str], index: Index | None = None) -> None:
        """`index`: of all the shards, where they are indexed."""
        self.card = card
        self.split = split
        self.folder = folder
        self.shards: Sequence[str] = tuple(shards)
        self._entries = dict(enumerate(index.shards)) if index is not None else {}
        self._reader = _Reader(card, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitSamples, (self.card, self.split, self.folder, self.shards)

    def entry(self, shard: int) -> ShardIndex:
        """What is known of a shard, which is indexed if nothing is."""
        if shard not in self._entries:
            known = _load_entry(_file(self.card, self.folder, self.shards[shard]))
            self._entries[shard] = known or self.index([shard]).shards[0]
        return self._entries[shard]

    @property
    def known(self) -> list[ShardIndex]:
        """What is known of the shards that were asked for."""
        return list(self._entries.values())

    def index(self, shards: Sequence[int]) -> Index:
        """The index of some of the shards, in this order; what is missing or out of date is built."""
        if any(shard not in self._entries for shard in shards):
            paths = [self.shards[shard] for shard in shards]
            built = index_shards(self.card, self.split, paths, self.folder, processes=None, progress=False)
            self._entries |= dict(zip(shards, built.shards, strict=True))
        return Index(self.card, self.split, self.folder, [self._entries[shard] for shard in shards])

    def sample(self, shard: int, row: int, choice: int = 0, stamp: int = 0) -> Sample:
        """Reads a sample under one of the card's choices.

        Args:
            stamp: `ShardIndex.number` that the shard had when somebody planned to read this row; 0: whatever it has.

        Raises:
            ShardChanged: the shard is not the one that was indexed, or was indexed anew since the row was planned.
            OSError: the disk or the network failed.
        """
        entry = self.entry(shard)
        if stamp and entry.number != stamp:
            raise ShardChanged(
                f"{entry.shard} was replaced, its card changed, or another version of mm reads it, and it was indexed "
                "anew since this sample was planned: its rows may be others. Restore it, or end the stage and add one "
                "(docs/stages.md)"
            )
        return self._reader.sample(entry, row, choice)


def fetch_rows_ahead(sources: Sequence[SplitSamples], source: np.ndarray, shard: np.ndarray) -> None:
    """Has the cache make what it keeps of the shards of rows that come next, in the background and in that order.

    Args:
        source: (k,) which of the sources each row is of.
        shard: (k,) the number of its shard there.
    """
    coming: list[Content] = []
    pairs, first = np.unique(np.stack([source, shard]), axis=1, return_index=True)
    for number, of_source in pairs[:, np.argsort(first)].T.tolist():
        samples = sources[number]
        if samples.card.cache is not None:
            entry = samples.entry(of_source)
            if (content := samples.card.kept(entry.shard, entry.stat)) is not None:
                coming.append(content)
    if coming:
        fetch_ahead(next(one.card.cache for one in sources if one.card.cache is not None), coming)


def shard_places(folder: Path, entry: ShardIndex) -> np.ndarray:
    """(rows, 2) int64 places of the samples of one shard, from its file in the index folder."""
    return _flat(_rows(folder, entry, ["place"]), "place").to_numpy(zero_copy_only=False).reshape(-1, 2)


def _rows(folder: Path, entry: ShardIndex, columns: list[str]) -> pa.Table:
    return pq.read_table(folder / entry.file, columns=columns, use_threads=False).slice(0, entry.rows)


def _errors(folder: Path, entry: ShardIndex) -> pa.Table:
    return pq.read_table(folder / entry.file, columns=["key", "error"], use_threads=False).slice(entry.rows)


# ----------------------------------------------------------------------------------------------------------- building


def index_card(card: Card, split: str, folder: str | Path, processes: int | None = 0, progress: bool = True) -> Index:
    """The index of a split; builds what is missing or out of date, see `index_shards`.

    Raises:
        IndexingError: nothing in the shards could be used.
    """
    index = index_shards(card, split, card.shards(split), folder, processes, progress)
    if not index.rows:
        raise IndexingError(f"{card.path}: no usable sample in split {split!r}\n{index.summary()}")
    return index


def index_shards(
    card: Card,
    split: str,
    shards: Sequence[str],
    folder: str | Path,
    processes: int | None = 0,
    progress: bool = True,
) -> Index:
    """The index of some shards of a split, such as those of one window.

    Args:
        folder: where the files of the index are and will be.
        processes: how many work in parallel; 0 works in this one; None decides when it sees how long a shard takes.
            They are spawned, so a script needs its ``if __name__ == "__main__":``.
        progress: show a bar once it takes more than a second.

    Raises:
        PassError: a process was killed.
        FileNotFoundError: a shard is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(16) as threads:
        entries = dict(zip(shards, threads.map(functools.partial(_current, card, folder), shards), strict=True))
    missing = [shard for shard, entry in entries.items() if entry is None]
    work = functools.partial(_index_shard, card, folder)
    entries |= each_shard(work, missing, processes, f"indexing {card.name}", progress)
    index = Index(card, split, folder, [entry for entry in entries.values() if entry is not None])
    if any(
        entry.errors or entry.dropped or entry.hidden or any(one.beside for one in entry.unread)
        for entry in index.shards
    ):
        logger.warning("%s", index.summary())
    return index


def _file(card: Card, folder: Path, shard: str) -> Path:
    """Where the index of a shard is. Cards that read the same shard in other ways do not displace each other's."""
    stem = Path(shard).name.partition(".")[0][:80]
    return folder / f"{stem}-{_digest([shard, card.mapping_fingerprint])[:16]}.parquet"


def _current(card: Card, folder: Path, shard: str) -> ShardIndex | None:
    """What is known of a shard if it has not changed, by size and version."""
    file = _file(card, folder, shard)
    entry = _load_entry(file)
    return entry if entry and card.stat(shard) == entry.stat else None


def _index_shard(card: Card, folder: Path, shard: str) -> ShardIndex:
    """Indexes a shard, unless another process has just done so."""
    file = _file(card, folder, shard)
    with FileLock(f"{file}.lock"):
        entry = _current(card, folder, shard)
        if entry is not None:
            return entry
        stat = card.stat(shard)
        opened = card.open(shard, stat)
        fingerprint = opened.file.fingerprint()
        before = _load_entry(file)
        if before is not None and before.fingerprint == fingerprint:
            entry, table = before, pq.read_table(file)  # copied or touched: the same bytes under another date
            entry = replace(entry, shard=shard, file=file.name, stat=stat, fingerprint=fingerprint)
        else:
            table, rows, dropped, unread = scan(card, opened)
            mapping = card.mapping_fingerprint
            errors, hidden = table.num_rows - rows, opened.hidden
            entry = ShardIndex(shard, file.name, rows, errors, stat, fingerprint, mapping, dropped, hidden, unread)
        opened.check()
        opened.close()
        write_table(table, file, _METADATA, {"version": INDEX_VERSION, **asdict(entry)})
        return entry


def _load_entry(file: Path) -> ShardIndex | None:
    """The stamp of a file of the index; None if there is none, or one of another version."""
    stamp = read_stamp(file, _METADATA)
    if stamp is None or stamp.pop("version") != INDEX_VERSION:
        return None
    stat, fingerprint = ShardStat(*stamp.pop("stat")), ShardFingerprint(*stamp.pop("fingerprint"))
    unread = tuple(Unread(*one) for one in stamp.pop("unread"))
    return ShardIndex(stat=stat, fingerprint=fingerprint, unread=unread, **stamp)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
