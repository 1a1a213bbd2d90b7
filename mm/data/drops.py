"""Samples that are to be left out, by decision: a small file beside the card, so that they outlast any index.

    cards/mine.yaml  ──mm data drop──▶  cards/mine.drops.json    {"train": {"shards/00000.tar": ["000012"]}}

A sample is written down as its shard and key, which stay when the index is built anew or its folder is deleted; rows do
not. Neither shards nor indexes are touched. A plan leaves the samples out and counts them, and one that was made before
is refused: its packs hold them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from mm.data.card import Card
from mm.data.index import Index

Drops = dict[str, dict[str, list[str]]]
"""Keys by split and shard, sorted."""


class DropError(ValueError):
    """A sample that cannot be dropped, or a file of drops that cannot be used."""


def drops_file(card: Card) -> Path:
    """Where the dropped samples of a card are written down."""
    return card.path.with_suffix(".drops.json")


def drop(index: Index, samples: Sequence[str], undo: bool = False) -> list[int]:
    """Writes down that samples are to be left out, or with `undo` no longer; returns the rows for which that is new.

    Args:
        samples: keys, or numbers of rows. Where a number is also the key of another row, say ``row:7`` or ``key:7``.

    Raises:
        DropError: no such sample, several of this key, or a card in a folder that cannot be written to.
    """
    before = dropped_rows(index)
    rows = np.unique([_row(index, sample) for sample in samples])
    file = drops_file(index.card)
    try:
        with FileLock(file.with_name(f".{file.name}.lock")):
            drops = _read(file)
            shards = drops.setdefault(index.split, {})
            for number, row in zip(index.shard[rows].tolist(), rows.tolist(), strict=True):
                shard = _name(index.card, index.shards[number].shard)
                keys = set(shards.get(shard, ())) - {key := index.key[row].as_py()}
                shards[shard] = sorted(keys if undo else {*keys, key})
            _write(file, drops)
    except PermissionError as error:
        raise DropError(
            f"{file} cannot be written; copy the card, with its relative paths, to another folder"
        ) from error
    return np.flatnonzero(dropped_rows(index) != before).tolist()


def dropped_rows(index: Index) -> np.ndarray:
    """(n,) bool, the rows of an index that are to be left out.

    Samples that are written down and in none of its shards are not a mistake: the card may have fewer shards now.

    Raises:
        DropError: the file is not what `drop` writes.
    """
    dropped = np.zeros(index.rows, bool)
    keys_of = _read(drops_file(index.card)).get(index.split)
    if keys_of:
        for number, entry in enumerate(index.shards):
            if keys := keys_of.get(_name(index.card, entry.shard)):
                start, stop = index.starts[number : number + 2].tolist()
                of_shard = index.key.slice(start, stop - start)
                options = pc.SetLookupOptions(pa.array(keys, pa.string()))
                dropped[start:stop] = np.asarray(pc.call_function("is_in", [of_shard], options))
    return dropped


def drops_identity(card: Card, split: str) -> str | None:
    """How many samples of a split are written down to be left out, and which: a fingerprint. None if none is."""
    keys_of = _read(drops_file(card)).get(split)
    if not keys_of:
        return None
    written = json.dumps(keys_of, sort_keys=True).encode()
    return f"{sum(map(len, keys_of.values()))} samples ({blake2b(written, digest_size=4).hexdigest()})"


def _row(index: Index, sample: str) -> int:
    """The row that a key or number means."""
    form, _, rest = sample.partition(":")
    if form == "row":
        return _numbered(index, sample, rest)
    wanted = rest if form == "key" else sample
    rows = np.flatnonzero(np.asarray(pc.call_function("equal", [index.key, pa.scalar(wanted)])))
    where = f"{index.card.name}/{index.split}"
    if form != "key" and sample.isdecimal() and str(int(sample)) == sample:
        if len(rows) and rows.tolist() != [int(sample)]:
            raise DropError(
                f"{sample} is a row of {where} and the key of row {rows[0]}: say row:{sample} or key:{sample}"
            )
        return _numbered(index, sample, sample)
    if not len(rows):
        raise DropError(f"{where} has no sample {wanted!r}; `mm data show` shows keys, and row:NUMBER names a row")
    shards = index.shard[rows].tolist()
    if len(set(shards)) > 1:
        some = ", ".join(
            f"row:{row} in {Path(index.shards[shard].shard).name}" for row, shard in zip(rows[:5], shards, strict=False)
        )
        raise DropError(
            f"{where} has {len(rows)} samples {wanted!r}: {some}{', …' if len(rows) > 5 else ''}; say which"
        )
    return int(rows[0])


def _numbered(index: Index, sample: str, number: str) -> int:
    if not (number.isdecimal() and int(number) < index.rows):
        raise DropError(f"{sample}: {index.card.name}/{index.split} has rows 0 to {index.rows - 1}")
    return int(number)


def _name(card: Card, shard: str) -> str:
    """A shard as it is written down: from the card's folder on if it lies in it, so that both can move together."""
    return shard.removeprefix(f"{card.path.parent}/")


def _read(file: Path) -> Drops:
    if not file.exists():
        return {}
    try:
        drops = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DropError(f"{file}: {error}; repair it, or delete it to have all samples back") from error
    if not _is_drops(drops):
        raise DropError(
            f'{file}: expected {{"SPLIT": {{"SHARD": ["KEY", …]}}}}; repair it, or delete it to have all back'
        )
    return drops


def _is_drops(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shards, dict)
        and all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in shards.values())
        for shards in value.values()
    )


def _write(file: Path, drops: Drops) -> None:
    """Replaces the file whole; one without drops goes."""
    kept = {split: {shard: keys for shard, keys in shards.items() if keys} for split, shards in drops.items()}
    kept = {split: shards for split, shards in kept.items() if shards}
    if not kept:
        file.unlink(missing_ok=True)
        return
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(file)
