"""Samples whose pictures or sounds are codes: read from columns beside the shards, row for row as the index has them.

    SplitSamples ──Sample with files──┐
    column image_codes ──item ids─────┴─▶ Sample with Codes in their place

The columns are what ``mm data tokenize`` wrote. No file is decoded. A column that belongs to other rows, to another
tokenizer or to a codebook of another size is refused, never shifted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from mm.data import columns
from mm.data.columns import ColumnError, ColumnReader
from mm.data.index import Index, SplitSamples
from mm.sample import BrokenSample, Codes, MediaPart, Modality, Part, Sample


@dataclass(frozen=True)
class CodeColumn:
    """The column with the codes of all items of a modality: per row a list an item, null where it could not be decoded.

    tokenizer: fingerprint of the tokenizer that computed it
    size: K of its codebook
    """

    modality: Modality
    tokenizer: str
    size: int

    type = pa.list_(pa.list_(pa.int32()))

    @property
    def name(self) -> str:
        return f"{self.modality.label}_codes"

    @property
    def fingerprint(self) -> str:
        return f"{self.tokenizer}, {self.size} codes"

    def check_computed(self, index: Index) -> None:
        """Raises `ColumnError`, with the command to run, unless all rows of an index with items have their codes."""
        problems = columns.problems(index, self.name, self.fingerprint)
        missing = [number for number in problems if self._has_items(index, number)]
        if not missing:
            return
        first = missing[0]
        others = set(columns.fingerprints(index, self.name)) - {self.fingerprint}
        known = f" There are codes of other tokenizers: {', '.join(sorted(others))}." if others else ""
        label, card, split = self.modality.label, index.card, index.split
        raise ColumnError(
            f"{card.name}/{split}: of {len(index.shards)} shards {len(missing)} have no {label} codes of the recipe's "
            f"tokenizer ({self.fingerprint}); the first, {index.shards[first].shard}: {problems[first]}.{known} Write "
            f"them with `mm data tokenize {card.path} --split {split} --folder {index.folder} --with FILE`, where FILE "
            f"holds what the recipe has as model.tokenizers.{label}"
        )

    def _has_items(self, index: Index, shard: int) -> bool:
        first, last = index.media_starts[index.starts[shard : shard + 2]]
        return bool((index.media[first:last, 0] == self.modality).any())


class CodedSamples:
    """The samples of a split, with codes in the place of the files of some modalities. Pickles small, for workers.

    Each worker keeps at most about `columns.KEPT` bytes of decoded codes a modality.
    """

    def __init__(self, samples: SplitSamples, code_columns: Sequence[CodeColumn]) -> None:
        self._samples = samples
        self._columns = tuple(code_columns)
        self._readers = {
            column.modality: ColumnReader(samples.folder, column.name, column.fingerprint) for column in code_columns
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return CodedSamples, (self._samples, self._columns)

    @property
    def shards(self) -> Sequence[str]:
        return self._samples.shards

    def sample(self, shard: int, row: int, choice: int = 0, stamp: int = 0) -> Sample:
        """Reads a sample under one of the card's choices, see `SplitSamples.sample`.

        Raises:
            BrokenSample: an item could not be decoded when its codes were to be computed.
            ColumnError: no codes for this shard, for other rows, or of another number of items.
        """
        sample = self._samples.sample(shard, row, choice, stamp)
        counts = Counter(part.modality for part in sample.media if part.modality in self._readers)
        items = {modality: self._items(shard, row, modality, count) for modality, count in counts.items()}
        return replace(sample, parts=tuple(_with_codes(sample, items)))

    def _items(self, shard: int, row: int, modality: Modality, count: int) -> Iterator[pa.ListScalar]:
        """The codes of a row's items."""
        entry = self._samples.entry(shard)
        items = self._readers[modality].value(entry, row)
        if len(items) != count:
            raise ColumnError(
                f"{entry.shard}, row {row}: {count} {modality.label} items, and codes of {len(items)}; the column was "
                "not written by `mm data tokenize`"
            )
        return iter(items)


def _with_codes(sample: Sample, items: Mapping[Modality, Iterator[pa.ListScalar]]) -> Iterator[Part]:
    """The parts of a sample, files replaced by the codes of the next item of their modality."""
    for part in sample.parts:
        if not isinstance(part, MediaPart) or part.modality not in items:
            yield part
            continue
        codes = next(items[part.modality])
        if not codes.is_valid:
            raise BrokenSample(f"no {part.modality.label} codes: the file could not be decoded when they were computed")
        yield Codes(part.modality, tuple(codes.values.to_numpy().tolist()), part.role)
