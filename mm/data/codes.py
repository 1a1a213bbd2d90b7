"""Samples whose pictures or sounds are codes: read from columns beside the shards, row for row as the index has them.

    SplitSamples ──Sample with files──┐
    column image_codes ──item ids─────┴─▶ Sample with Codes in their place

The columns are what ``mm data tokenize`` wrote. No file is decoded. A column that belongs to other rows, to another
tokenizer or to a codebook of another size is refused, never shifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        """Raises `ColumnError`, with the command to run, unless the column is there for all rows of an index."""
        problems = list(columns.problems(index, self.name, self.fingerprint))
        if not problems:
            return
        others = set(columns.fingerprints(index, self.name)) - {self.fingerprint}
        known = f" There are codes of other tokenizers: {', '.join(sorted(others))}." if others else ""
        label, card, split = self.modality.label, index.card, index.split
        raise ColumnError(
            f"{card.name}/{split}: of {len(index.shards)} shards {len(problems)} have no {label} codes of the recipe's "
            f"tokenizer ({self.fingerprint}); the first: {problems[0]}.{known} Write them with "
            f"`mm data tokenize {card.path} --split {split} --folder {index.folder} --with FILE`, where FILE holds "
            f"what the recipe has as model.tokenizers.{label}"
        )


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
            ColumnError: no codes for this shard, or for other rows.
        """
        sample = self._samples.sample(shard, row, choice, stamp)
        entry = self._samples.entry(shard)
        items = {modality: iter(reader.value(entry, row)) for modality, reader in self._readers.items()}
        name = f"{Path(entry.shard).name}, row {row}"
        return Sample(sample.source, sample.key, tuple(_with_codes(sample, items, name)))


def _with_codes(sample: Sample, items: Mapping[Modality, Iterator[pa.ListScalar]], name: str) -> Iterator[Part]:
    """The parts of a sample, files replaced by the codes of the next item of their modality."""
    for part in sample.parts:
        if not isinstance(part, MediaPart) or part.modality not in items:
            yield part
            continue
        item = next(items[part.modality], None)
        if item is None:
            raise ColumnError(f"{name}: the column has codes of fewer {part.modality.label} items than the sample")
        if not item.is_valid:
            raise BrokenSample(f"no {part.modality.label} codes: the file could not be decoded when they were computed")
        yield Codes(part.modality, tuple(item.values.to_numpy().tolist()), part.role)
