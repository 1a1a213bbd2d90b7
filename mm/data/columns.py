"""Columns: anything computed for the samples of an index, one file a shard, row for row as the index has them.

    index ──compute(name, fingerprint, function)──▶ folder/columns/<name>-<fingerprint>/<shard>.parquet ──load──▶ array

Reading needs no join. What makes that safe is the stamp: a file carries the identity of the rows it was computed for,
and is refused, never shifted, where the index has others. The fingerprint says how the values were computed (a
tokenizer and template, a model and resolution), so that columns of one name from different functions do not mix.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from mm.data.card import Card
from mm.data.index import Index, ShardIndex, shard_places
from mm.data.passes import each_shard, read_stamp, write_table
from mm.data.shards import ShardChanged
from mm.sample import BrokenSample, Sample

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
    _run(index, name, fingerprint, functools.partial(_first, function), type, processes, progress)
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
    values = functools.partial(_every, function, len(index.card.choices))
    _run(index, name, fingerprint, values, pa.list_(type), processes, progress)


def load(index: Index, name: str, fingerprint: str) -> pa.ChunkedArray:
    """A column over all rows of the index.

    Raises:
        ColumnError: it was not computed, or for other rows.
    """
    chunks: list[pa.Array] = []
    folder = column_folder(index, name, fingerprint)
    for entry in index.shards:
        if problem := _problem(entry, folder / entry.file):
            raise ColumnError(f"column {name!r} ({fingerprint}) of {entry.shard}: {problem}")
        chunks += pq.read_table(folder / entry.file, columns=[name], use_threads=False).column(name).chunks
    return pa.chunked_array(chunks)


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


def column_folder(index: Index, name: str, fingerprint: str) -> Path:
    """Where the files of a column are."""
    if not _NAME.fullmatch(name):
        raise ColumnError(f"column name {name!r}: letters, digits and underscores only, it is used in expressions")
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
    return index.folder / "columns" / f"{name}-{digest}"


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


def _run(
    index: Index,
    name: str,
    fingerprint: str,
    values: Callable[[Callable[[int], Sample]], Any],
    type: pa.DataType,
    processes: int | None,
    progress: bool,
) -> None:
    folder = column_folder(index, name, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    work = _Pass(index.card, index.folder, folder, name, fingerprint, values, type)
    missing = [entry for entry in index.shards if _problem(entry, folder / entry.file)]
    each_shard(work, missing, processes, f"computing {name}", progress)


@dataclass(frozen=True)
class _Pass:
    """The computation of a column, as it travels to the processes.

    folder: where its files go
    values: value of a row from a function that gives its sample under a choice
    """

    card: Card
    index_folder: Path
    folder: Path
    name: str
    fingerprint: str
    values: Callable[[Callable[[int], Sample]], Any]
    type: pa.DataType

    def __call__(self, entry: ShardIndex) -> None:
        """Computes and writes the column of one shard."""
        file = self.folder / entry.file
        with FileLock(f"{file}.lock"):
            if _problem(entry, file) is None:
                return  # another process has just computed it
            table = pa.table({self.name: pa.array(self._values(entry), self.type)})
            write_table(table, file, _METADATA, {"stamp": entry.stamp, "fingerprint": self.fingerprint})

    def _values(self, entry: ShardIndex) -> list[Any]:
        """Values of the rows of one shard, in one sequential pass over it."""
        places = [tuple(place) for place in shard_places(self.index_folder, entry).tolist()]
        shard = self.card.open(entry.shard, entry.stat)
        shard.check()
        found: list[Any] = []
        for scanned in shard.scan():
            if scanned.record is None or len(found) == len(places) or scanned.place != places[len(found)]:
                continue  # a record that is no sample has no row
            try:
                found.append(self.values(functools.partial(self.card.sample, scanned.record)))
            except BrokenSample:
                found.append(None)
        shard.check()
        shard.close()
        if len(found) != entry.rows:
            raise ShardChanged(f"{entry.shard}: {len(found)} of the {entry.rows} indexed samples were found")
        return found


def _first(function: Callable[[Sample], Any], sample: Callable[[int], Sample]) -> Any:
    return function(sample(0))


def _every(function: Callable[[Sample], Any], choices: int, sample: Callable[[int], Sample]) -> list[Any]:
    return [function(sample(choice)) for choice in range(choices)]


def _problem(entry: ShardIndex, file: Path) -> str | None:
    """Why a file does not hold the column for the rows of a shard, None if it does."""
    stamp = read_stamp(file, _METADATA)
    if stamp is None:
        return f"not computed, no file {file}"
    if stamp["stamp"] != entry.stamp:
        return f"computed for other rows: {file} has the stamp {stamp['stamp']}, the index {entry.stamp}"
    return None
