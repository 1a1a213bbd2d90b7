"""Data cards: what a dataset is, where its shards lie, and how a record becomes a `Sample`.

    name: cc3m                                # Sample.source
    licence: …                                # of the data; what the release says, in a line
    origin: …                                 # where it was got, with what command
    description: …                            # optional
    format: webdataset                        # or parquet, jsonl
    splits:
      train: {shards: ["cc3m/{00000..00331}.tar"]}      # paths, globs, ranges, ~, URLs; relative to the card's folder
    sample:                                   # parts in order, or in several orders, see mm.data.mapping
      - image: [webp, jpg, png]               # first field that is present
      - text: [{from: txt, p: 0.3}, {from: json.recaption, p: 0.7}]     # a choice
    key: json.uid                             # optional: a label other than the record's own key
    statistics: {samples: 3_318_333}          # optional, free: what its makers say

``data_cards/README.md`` explains every key with an example for each kind of dataset.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import fsspec

from mm import configure
from mm.data.cache import Content, ShardCache, ShardCopy
from mm.data.mapping import (
    PADDING,
    MappingError,
    RecordMapping,
    check_keys,
    look_up,
    parse_mapping,
    prefixes,
    reading_a_record,
)
from mm.data.rows import ParquetRows, RowShard
from mm.data.shards import (
    FORMATS,
    Record,
    Shard,
    ShardError,
    ShardStat,
    is_remote,
    open_file,
    open_shard,
    refuse_unreadable,
)
from mm.data.unread import UnreadFiles
from mm.sample import BrokenSample, Sample, encodable_key

MAPPING_VERSION = 3
"""Raised when the same card gives other samples than before, so that indexes are built anew."""

MOST_SHARDS = 1_000_000
"""Most shards that the ranges of one pattern may name."""

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_REQUIRED = ("name", "licence", "origin", "format", "splits", "sample")
_OPTIONAL = ("description", "key", "statistics")


class CardError(ValueError):
    """A data card that cannot be used; the message names the file, the key and what is allowed."""


@dataclass(frozen=True)
class Card:
    """A dataset, see the module.

    splits: the shards of each split as written in the card
    sample_form: the ``sample:`` of the card as written; `mapping` is what it means
    key: path of the field that labels a sample, or None for the record's own key
    path: the card's file
    cache: where copies of its remote shards, and rows of its parquet files, are kept; None reads all in place
    """

    name: str
    licence: str
    origin: str
    format: str
    splits: dict[str, tuple[str, ...]]
    sample_form: Any
    path: Path
    description: str = ""
    key: str | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    cache: ShardCache | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The card in a YAML file.

        Raises:
            CardError: unknown or missing keys, or values of the wrong kind.
        """
        path = Path(path).expanduser().resolve()
        try:
            spec = configure.read_yaml(path)
            check_keys(spec, _REQUIRED, _OPTIONAL, "card")
            for key in ("name", "licence", "origin", "description", "key"):
                if key in spec and not (isinstance(spec[key], str) and spec[key]):
                    raise MappingError(f"{key}: {spec[key]!r}, expected a text")
            if spec["format"] not in FORMATS:
                raise MappingError(f"format: {spec['format']!r}, allowed are {', '.join(FORMATS)}")
            if not isinstance(spec.get("statistics", {}), dict | None):
                raise MappingError(f"statistics: {spec['statistics']!r}, expected a mapping")
            parse_mapping(spec["sample"])
            splits = _parse_splits(spec["splits"])
        except configure.RecipeError as error:  # which names file and line
            raise CardError(f"not a data card: {error}") from error
        except MappingError as error:
            raise CardError(f"{path}: {error}") from error
        return cls(
            name=spec["name"],
            licence=spec["licence"],
            origin=spec["origin"],
            format=spec["format"],
            splits=splits,
            sample_form=spec["sample"],
            path=path,
            description=spec.get("description", ""),
            key=spec.get("key"),
            statistics=spec.get("statistics") or {},
        )

    def shards(self, split: str) -> list[str]:
        """Paths and URLs of a split's shards: ranges and globs expanded, in the order of the card, globs sorted.

        Raises:
            CardError: no such split, a pattern that matches nothing, a file that is not there, a shard named twice, or
                a compressed one.
        """
        if split not in self.splits:
            raise CardError(f"{self.path}: no split {split!r}, the card has {', '.join(self.splits)}")
        shards = []
        for pattern in self.splits[split]:
            for one in _expand_ranges(pattern):
                try:
                    refuse_unreadable(one)
                except ShardError as error:
                    raise CardError(f"{self.path}: {error}") from error
                shards += self._match(one)
        twice = [shard for shard, following in itertools.pairwise(sorted(shards)) if shard == following]
        if twice:
            raise CardError(f"{self.path}: split {split!r} names a shard twice: {twice[0]}")
        return shards

    def open(self, shard: str, expected: ShardStat | None = None) -> Shard:
        """A shard of this card for reading; of a parquet file only the columns that the card reads.

        Args:
            expected: size and version when it was indexed; without them the cache is not used.
        """
        columns = self._columns if self.format == "parquet" else ()
        if self.cache is None or expected is None:
            return open_shard(shard, self.format, columns, expected)
        if self.format == "parquet":
            return RowShard(self.cache, shard, expected, columns)
        file = self.cache.file(shard, expected) if is_remote(shard) else None
        return open_shard(shard, self.format, columns, expected, file)

    def stat(self, shard: str) -> ShardStat:
        """Size and version of a shard as they are now."""
        return open_file(shard).stat()

    def kept(self, shard: str, stat: ShardStat) -> Content | None:
        """What the cache keeps of a shard that is read in shuffled order, None if nothing."""
        if self.cache is None:
            return None
        if self.format == "parquet":
            return ParquetRows(shard, stat, self._columns)
        return ShardCopy(shard, stat) if is_remote(shard) else None

    @property
    def choices(self) -> tuple[float, ...]:
        """Probabilities of the alternative texts, at least one; a choice is a number below their count."""
        return self.mapping.choices

    def choice(self, uniform: float) -> int:
        """The choice that a number drawn from [0, 1) falls on."""
        return min(bisect_right(self._cumulative, uniform), len(self.choices) - 1)

    def sample(self, record: Record, choice: int = 0) -> Sample:
        """The sample in a record, under one of the choices.

        Raises:
            BrokenSample: the record cannot become a sample, for whatever reason.
        """
        with reading_a_record():
            return Sample(self.name, self._label(record), self.mapping.parts(record.fields, choice))

    def unread_files(self) -> UnreadFiles | None:
        """A count of files that no field of this card reads; None where it cannot tell, or fields are no files."""
        if self.format != "webdataset" or self.mapping.names_files:
            return None
        return UnreadFiles(self._columns)

    @cached_property
    def mapping(self) -> RecordMapping:
        """What ``sample:`` means."""
        return parse_mapping(self.sample_form)

    @cached_property
    def mapping_fingerprint(self) -> str:
        """Changes when the same shards would give other samples."""
        meaning = json.dumps([MAPPING_VERSION, self.format, self.sample_form, self.key], sort_keys=True)
        return hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(itertools.accumulate(self.choices))

    @cached_property
    def _columns(self) -> frozenset[str]:
        paths = [*self.mapping.paths(), *([self.key] if self.key else [])]
        return frozenset(name for path in paths for name in prefixes(path))

    def _label(self, record: Record) -> str:
        label = record.key if self.key is None else look_up(record.fields, self.key)
        if isinstance(label, bytes):
            label = label.decode("utf-8", "backslashreplace").strip().strip(PADDING)
        if not isinstance(label, str | int):
            raise BrokenSample(f"missing key: {self.key!r}")
        return encodable_key(str(label))

    def _match(self, pattern: str) -> list[str]:
        if is_remote(pattern):
            return self._match_remote(pattern)
        try:
            local = self.path.parent / Path(pattern.removeprefix("file://")).expanduser()
            if local.exists():
                return [str(local)]
        except (OSError, RuntimeError) as error:  # a name too long, or the folder of an unknown user
            raise CardError(f"{self.path}: {pattern[:100]!r} cannot be looked for: {error}") from error
        # not Path.glob, which takes no absolute patterns
        matches = sorted(glob.glob(str(local), recursive=True)) if glob.has_magic(pattern) else []  # noqa: PTH207
        if not matches:
            raise CardError(f"{self.path}: no shard matches {pattern!r} (looked for {local})")
        return matches

    def _match_remote(self, pattern: str) -> list[str]:
        if "*" not in pattern:
            return [pattern]
        if "::" in pattern:
            raise CardError(f"{self.path}: {pattern!r}: a chained URL takes ranges, {{0000..0099}}, but no globs")
        system, inner = fsspec.url_to_fs(pattern)
        matches = sorted(system.unstrip_protocol(match) for match in system.glob(inner))
        if not matches:
            raise CardError(f"{self.path}: no shard matches {pattern!r}")
        return matches


def _parse_splits(spec: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(spec, dict) or not spec:
        raise MappingError("splits: expected a mapping such as `train: {shards: [...]}`")
    splits = {}
    for name, split in spec.items():
        check_keys(split, ("shards",), (), f"splits.{name}")
        shards = [split["shards"]] if isinstance(split["shards"], str) else split["shards"]
        if not isinstance(shards, list) or not shards or not all(isinstance(shard, str) for shard in shards):
            raise MappingError(f"splits.{name}.shards: {split['shards']!r}, expected a list of paths, globs or URLs")
        for pattern in shards:
            _check_pattern(pattern, f"splits.{name}.shards")
        splits[str(name)] = tuple(shards)
    return splits


def _check_pattern(pattern: str, where: str) -> None:
    number = 1
    for first, last in _RANGE.findall(pattern):
        if int(last) < int(first):
            raise MappingError(f"{where}: the range in {pattern!r} runs backwards")
        number *= int(last) - int(first) + 1
    if number > MOST_SHARDS:
        raise MappingError(f"{where}: the ranges of {pattern!r} name {number:,} shards, at most {MOST_SHARDS:,}")
    if "\0" in pattern:
        raise MappingError(f"{where}: {pattern!r} holds a NUL, which no path can")


def _expand_ranges(pattern: str) -> Iterator[str]:
    """``a{00..11}`` to ``a00`` … ``a11``; every range of a pattern, the last one fastest."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        head = f"{pattern[: match.start()]}{number:0{len(first)}}"
        yield from (head + tail for tail in _expand_ranges(pattern[match.end() :]))
