"""Codes of all items of a modality, written once, so that training reads ids and not pixels: ``mm data tokenize``.

row ─▶ items ─decode, prepare─▶ tensors ─collate─▶ MediaTokenizer ─▶ codes, a list an item, null if it is damaged
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mm import configure, media
from mm.data import columns
from mm.data.codes import CodeColumn
from mm.data.columns import Row
from mm.data.index import Index
from mm.sample import BrokenSample, MediaPart
from mm.score.passes import Scorer, score_index
from mm.tokenizers.base import MediaTokenizer

THREADS = min(8, os.cpu_count() or 1)
"""Decode and prepare beside each other; Pillow and torch let go of the interpreter while they do."""


class Written(NamedTuple):
    """What a column of codes holds: items, those of them that could not be decoded, and codes."""

    items: int
    broken: int
    codes: int


class TokenizerScorer(Scorer):
    """The codes of a tokenizer that a spec ``{_target_: …, option: value}`` describes."""

    def __init__(self, spec: Mapping[str, Any], device: str = "cpu") -> None:
        self._spec = json.dumps(dict(spec), sort_keys=True)
        self._device = device
        with torch.device("meta"):
            tokenizer = configure.build(spec, MediaTokenizer)
        self.column = CodeColumn(tokenizer.transform.modality, tokenizer.fingerprint, tokenizer.codes)
        self.name, self.type, self.fingerprint = self.column.name, self.column.type, self.column.fingerprint

    def values(self, rows: Sequence[Row]) -> list[list[np.ndarray | None]]:
        """For each row the (L,) int32 codes of its items, None for one that cannot be decoded."""
        items = [[part for part in row(0).media if part.modality == self.column.modality] for row in rows]
        tokenizer = _loaded(self._spec, self._device)
        parts = [part for of_row in items for part in of_row]
        prepared = list(_threads().map(functools.partial(_prepared, tokenizer), parts))
        usable = [one for one in prepared if one is not None]
        codes = iter(tokenizer.codes_of([tensor for tensor, _ in usable], [grid for _, grid in usable]))
        found = iter([None if one is None else next(codes) for one in prepared])
        return [[next(found) for _ in of_row] for of_row in items]


def tokenize(
    index: Index,
    spec: Mapping[str, Any],
    device: str = "cpu",
    batch: int = 32,
    processes: int | None = 0,
    progress: bool = True,
) -> Written:
    """Writes the codes of a tokenizer for all rows of an index, where they are missing; see `score_index`."""
    scorer = TokenizerScorer(spec, device)
    score_index(index, scorer, batch, processes, progress)
    return written(index, scorer.column)


def written(index: Index, column: CodeColumn) -> Written:
    """What a column of codes holds, a shard at a time."""
    totals = Written(0, 0, 0)
    folder = columns.column_folder(index.folder, column.name, column.fingerprint)
    for entry in index.shards:
        items = pq.read_table(folder / entry.file, use_threads=False).column(column.name).combine_chunks().flatten()
        totals = Written(
            totals.items + len(items), totals.broken + items.null_count, totals.codes + len(items.flatten())
        )
    return totals


def _prepared(tokenizer: MediaTokenizer, part: MediaPart) -> tuple[Tensor, tuple[int, ...]] | None:
    """The model input of an item and the grid that the plan counts on; None where the file is damaged."""
    try:
        return tokenizer.transform.prepare(media.decode(part)), tokenizer.transform.grid(media.facts(part))
    except BrokenSample:
        return None


@functools.lru_cache(maxsize=1)
def _loaded(spec: str, device: str) -> MediaTokenizer:
    """The tokenizer with its weights, once a process."""
    return configure.build(json.loads(spec), MediaTokenizer).eval().to(device)


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)
