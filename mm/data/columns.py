"""Columns: anything computed for the samples of an index, one file a shard, row for row as the index has them.

    index ──compute(name, fingerprint, function)──▶ folder/columns/<name>-<fingerprint>/<shard>.parquet ──load──▶ array
                                                                                      └─ColumnReader─▶ value of a row

Reading needs no join. What makes that safe is the stamp: a file carries the identity of the rows it was computed for,
and is refused, never shifted, where the index has others. The fingerprint says how the values were computed (a
tokenizer and template, a model and resolution), so that columns of one name from different functions do not mix.
"""

from __future__ import annotations

import functools
import hashlib
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from mm.data.card import Card
from mm.data.index import OPEN_SHARDS, Index, ShardIndex, shard_places
from mm.data.passes import each_shard, read_stamp, write_table
from mm.data.shards import Shard, ShardChanged
from mm.sample import BrokenSample, Sample

Row = Callable[[int], Sample]
"""The sample of a row under a choice of the card."""

Values = Callable[[Iterator[Row]], Iterator[Any]]
"""From the rows of a shard to their values, one each and in order; None for a row without."""

KEPT = 128 * 1024**2
"""Bytes of decoded rows that a `ColumnReader` keeps. The rows read last are kept whatever their size."""

_METADATA = b"mm.column"
_NAME = re.compile(r"[A-Za-z0-9_]+")


class ColumnError(ValueError):
    """A column that is missing, or that belongs to other rows than those of the index."""


def compute(
    index: Index,
    name: str,
    fingerprint: str,
    function: Callable[[Sample], Any],
    type: pa.DataType,
    processes: int = 0,
    progress: bool = True,
) -> pa.ChunkedArray:
    """The column of ``function(sample)`` for every row, of the sample under its first choice.

    Shards that have their file are not computed again, so a pass that was killed goes on; one that was indexed anew is.

    Args:
        name: letters, digits and underscores.
        fingerprint: identity of the function and of all it depends on.
        function: must pickle where there are processes. A sample on which it raises `BrokenSample` gets null.
        type: of the values.
        processes: how many work in parallel, 0 for this one only; see `mm.data.index.index_shards`.

    Raises:
        ShardChanged: a shard is not the one that was indexed.
    """
    one = functools.partial(_first, function)
    ensure(index, name, fingerprint, functools.partial(_one_by_one, one), type, processes, progress)
    return load(index, name, fingerprint)


def compute_choices(
    index: Index,
    name: str,
    fingerprint: str,
    function: Callable[[Sample], Any],
    type: pa.DataType,
    processes: int | None = 0,
    progress: bool = True,
) -> pa.ChunkedArray:
    """The list column of ``function(sample)`` under each choice of the card, such as lengths in tokens; see `compute`.

    Args:
        type: of the values in the lists.
    """
    ensure_choices(index, name, fingerprint, function, type, processes, progress)
    return load(index, name, fingerprint)


def ensure_choices(
    index: Index,
    name: str,
    fingerprint: str,
    function: Callable[[Sample], Any],
    type: pa.DataType,
    processes: int | None = 0,
    progress: bool = True,
) -> None:
    """Computes what is missing of the column of `compute_choices` and loads none of it."""
    every = functools.partial(_every, function, len(index.card.choices))
    ensure(index, name, fingerprint, functools.partial(_one_by_one, every), pa.list_(type), processes, progress)


def ensure(
    index: Index,
    name: str,
    fingerprint: str,
    values: Values,
    type: pa.DataType,
    processes: int | None = 0,
    progress: bool = True,
    group: int | None = None,
) -> None:
    """Computes what is missing of the column of `values` over the rows of each shard, and loads none of it.

    It is for what looks at many samples at once, such as a model at a batch; see `compute` for one at a time.

    Args:
        group: rows that can be read on their own, for values that are too large to be loaded all; see `ColumnReader`.
    """
    folder = column_folder(index.folder, name, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    work = _Pass(index.card, index.folder, folder, name, fingerprint, values, type, group)
    missing = [entry for entry in index.shards if _problem(entry, folder / entry.file)]
    each_shard(work, missing, processes, f"computing {name}", progress)


def load(index: Index, name: str, fingerprint: str) -> pa.ChunkedArray:
    """A column over all rows of the index.

    Raises:
        ColumnError: it was not computed, or for other rows.
    """
    for number, problem in problems(index, name, fingerprint).items():
        raise ColumnError(f"column {name!r} ({fingerprint}) of {index.shards[number].shard}: {problem}")
    folder = column_folder(index.folder, name, fingerprint)
    chunks: list[pa.Array] = []
    for entry in index.shards:
        chunks += pq.read_table(folder / entry.file, columns=[name], use_threads=False).column(name).chunks
    return pa.chunked_array(chunks)


def problems(index: Index, name: str, fingerprint: str) -> dict[int, str]:
    """Numbers of the shards for whose rows a column was not computed, each with the reason."""
    folder = column_folder(index.folder, name, fingerprint)
    found = ((number, _problem(entry, folder / entry.file)) for number, entry in enumerate(index.shards))
    return {number: problem for number, problem in found if problem is not None}


class ColumnReader:
    """Values of a column in shuffled order, at most about `KEPT` bytes of it in memory. Pickles small, for workers."""

    def __init__(self, folder: Path, name: str, fingerprint: str) -> None:
        """`folder`: of the index."""
        self._arguments = (folder, name, fingerprint)
        self._name = name
        self._folder = column_folder(folder, name, fingerprint)
        self._files: OrderedDict[str, tuple[pq.ParquetFile, Sequence[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return ColumnReader, self._arguments

    def value(self, entry: ShardIndex, row: int) -> pa.Scalar:
        """The value of a row of a shard.

        Raises:
            ColumnError: the column was not computed for the shard, or for other rows than it has.
        """
        file, starts = self._open(entry)
        group = bisect_right(starts, row) - 1
        return self._group(entry.file, file, group)[row - starts[group]]

    def _open(self, entry: ShardIndex) -> tuple[pq.ParquetFile, Sequence[int]]:
        """The file of a shard, and the first row of each of its row groups."""
        if entry.file not in self._files:
            if problem := _problem(entry, self._folder / entry.file):
                raise ColumnError(f"column {self._name!r} of {entry.shard}: {problem}")
            file = pq.ParquetFile(self._folder / entry.file)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            self._files[entry.file] = file, [sum(sizes[:number]) for number in range(len(sizes))]
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(entry.file)
        return self._files[entry.file]

    def _group(self, name: str, file: pq.ParquetFile, group: int) -> pa.Array:
        key = (name, group)
        if key not in self._groups:
            table = file.read_row_group(group, columns=[self._name], use_threads=False)
            self._groups[key] = table.column(0).combine_chunks()
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def fingerprints(index: Index, name: str) -> list[str]:
    """Fingerprints under which a column was computed for the shards of the index; where several were, of whole ones."""
    found = {folder: _fingerprint(index, folder) for folder in _folders(index, name) if _files(index, folder)}
    if len(found) > 1:
        found = {
            folder: fingerprint
            for folder, fingerprint in found.items()
            if not any(_problem(entry, folder / entry.file) for entry in index.shards)
        } or found
    return sorted(found.values())


def names(index: Index) -> list[str]:
    """Names of the columns that were computed for shards of the index."""
    return sorted({folder.name.rpartition("-")[0] for folder in _folders(index) if _files(index, folder)})


def column_folder(folder: Path, name: str, fingerprint: str) -> Path:
    """Where the files of a column are, of an index in `folder`."""
    if not _NAME.fullmatch(name):
        raise ColumnError(f"column name {name!r}: letters, digits and underscores only, it is used in expressions")
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
    return folder / "columns" / f"{name}-{digest}"


def _folders(index: Index, name: str = "*") -> list[Path]:
    """Folders of computed columns, of this card and of others: they share a folder as their indexes do."""
    if name != "*" and not _NAME.fullmatch(name):
        return []
    return sorted((index.folder / "columns").glob(f"{name}-{'[0-9a-f]' * 16}"))


def _files(index: Index, folder: Path) -> set[str]:
    """The files in the folder of a column that are for shards of the index."""
    return {path.name for path in folder.iterdir()} & {entry.file for entry in index.shards}


def _fingerprint(index: Index, folder: Path) -> str:
    stamp = read_stamp(folder / min(_files(index, folder)), _METADATA)
    return stamp["fingerprint"]


@dataclass(frozen=True)
class _Pass:
    """The computation of a column, as it travels to the processes.

    folder: where its files go
    """

    card: Card
    index_folder: Path
    folder: Path
    name: str
    fingerprint: str
    values: Values
    type: pa.DataType
    group: int | None

    def __call__(self, entry: ShardIndex) -> None:
        """Computes and writes the column of one shard."""
        file = self.folder / entry.file
        with FileLock(f"{file}.lock"):
            if _problem(entry, file) is None:
                return  # another process has just computed it
            table = pa.table({self.name: pa.array(self._values(entry), self.type)})
            stamp = {"stamp": entry.stamp, "fingerprint": self.fingerprint}
            write_table(table, file, _METADATA, stamp, self.group)

    def _values(self, entry: ShardIndex) -> list[Any]:
        """Values of the rows of one shard, in one sequential pass over it."""
        shard = self.card.open(entry.shard, entry.stat)
        shard.check()
        found = list(self.values(self._rows(entry, shard)))
        shard.check()
        shard.close()
        if len(found) != entry.rows:
            raise ShardChanged(f"{entry.shard}: {len(found)} of the {entry.rows} indexed samples were found")
        return found

    def _rows(self, entry: ShardIndex, shard: Shard) -> Iterator[Row]:
        places = iter([tuple(place) for place in shard_places(self.index_folder, entry).tolist()])
        awaited = next(places, None)
        for scanned in shard.scan():
            if scanned.record is not None and scanned.place == awaited:  # a record that is no sample has no row
                yield functools.partial(self.card.sample, scanned.record)
                awaited = next(places, None)


def _one_by_one(value: Callable[[Row], Any], rows: Iterator[Row]) -> Iterator[Any]:
    for row in rows:
        try:
            yield value(row)
        except BrokenSample:
            yield None


def _first(function: Callable[[Sample], Any], row: Row) -> Any:
    return function(row(0))


def _every(function: Callable[[Sample], Any], choices: int, row: Row) -> list[Any]:
    return [function(row(choice)) for choice in range(choices)]


def _problem(entry: ShardIndex, file: Path) -> str | None:
    """Why a file does not hold the column for the rows of a shard, None if it does."""
    stamp = read_stamp(file, _METADATA)
    if stamp is None:
        return f"not computed, no file {file}"
    if stamp["stamp"] != entry.stamp:
        return f"computed for other rows: {file} has the stamp {stamp['stamp']}, the index {entry.stamp}"
    return None
