"""The plan's numbers become batches: read bytes at their place, decode, prepare, collate.

A map-style dataset, so that a loader worker can make any micro-step of any rank without having made the ones before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from mm.layers.layout import WHOLE, Share
from mm.packing.batch import Batch
from mm.packing.collate import Document, LengthMismatch, Owner, Processor
from mm.packing.hashing import hash64
from mm.packing.weights import Weighting
from mm.packing.windows import PlannedSample, PlanReader
from mm.sample import BrokenSample, Sample

RETRIES = 4
FIRST_WAIT = 0.5  # seconds; doubles with each retry
AHEAD = 2048
"""Packs after which `ahead` is called again, with the rows of twice as many."""


class Samples(Protocol):
    """What this room needs of a source: the sample of a row of a shard, as it was when that row was planned."""

    @property
    def shards(self) -> Sequence[str]: ...

    def sample(self, shard: int, row: int, choice: int, stamp: int) -> Sample: ...


class MicroStep(NamedTuple):
    """What one rank works on between two meetings of all ranks: some packs of the plan, -1 for an empty one."""

    step: int
    packs: tuple[int, ...]


class Materialiser(Dataset[Batch]):
    """Batches of a plan.

    Args:
        plan: which rows share which pack.
        sources: the samples of each source of the plan, in its order.
        names: the sources' names, for messages.
        capacity: pad packs to this length (static shapes), or None.
        seed: of what layers draw for a pack, together with its number.
        share: the part of every stream that is computed here, see `Batch.share`.
        weightings: the loss weights of each source; none weigh 1.
        ahead: is given the rows that come next, two (k,) arrays of sources and shards in the order of the plan.
    """

    def __init__(
        self,
        plan: PlanReader,
        sources: Sequence[Samples],
        processor: Processor,
        *,
        names: Sequence[str],
        seed: int = 0,
        capacity: int | None = None,
        share: Share = WHOLE,
        weightings: Sequence[Weighting] = (),
        ahead: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        self.plan = plan
        self.sources = list(sources)
        self.processor = processor
        self.names = list(names)
        self.seed = seed
        self.capacity = capacity
        self.share = share
        self.weightings = list(weightings)
        self.ahead = ahead
        self._looked: range = range(0)

    def __getitem__(self, micro_step: MicroStep) -> Batch:
        self._look_ahead(max(micro_step.packs))
        broken: list[tuple[str, str]] = []
        packs, rows = [], []
        for number in micro_step.packs:
            documents, owners = self._pack(number, broken) if number >= 0 else ([], [])
            packs.append(documents)
            rows.append(owners)
        seeds = hash64(self.seed, "draws", np.array(micro_step.packs)).astype(np.int64).tolist()
        return self.processor.collate(packs, rows, capacity=self.capacity, broken=broken, share=self.share, seeds=seeds)

    def _look_ahead(self, number: int) -> None:
        if self.ahead is None or number < 0 or number in self._looked:
            return
        self._looked = range(number, number + AHEAD)
        packs = [self.plan.pack(coming) for coming in range(number, min(number + 2 * AHEAD, self.plan.planned))]
        if packs:
            self.ahead(np.concatenate([pack.source for pack in packs]), np.concatenate([pack.shard for pack in packs]))

    def _pack(self, number: int, broken: list[tuple[str, str]]) -> tuple[list[Document], list[Owner]]:
        samples = self.plan.pack(number).samples()
        documents = [self._document(planned, broken) for planned in samples]
        return documents, [(planned.source, planned.shard, planned.row) for planned in samples]

    def _document(self, planned: PlannedSample, broken: list[tuple[str, str]]) -> Document:
        """A planned sample as a document of exactly the promised length; padding if its data is broken."""
        source, shard, row, stamp, choice, _, length, truncated = planned
        name = f"{self.names[source]}, {Path(self.sources[source].shards[shard]).name}, row {row}"
        try:
            sample = read_patiently(lambda: self.sources[source].sample(shard, row, choice, stamp), name)
            name = f"{name} ({sample.key})"
            document = self.processor.document(sample)
        except BrokenSample as error:
            broken.append((name, str(error)))
            return self.processor.padding(length)
        # Cutting whatever is too long would hide a sample that grew behind the plan's back.
        if len(document) < length or (len(document) > length and not truncated):
            raise LengthMismatch(
                f"{name}: the plan promised {length} tokens, the sample has {len(document)}. Was the tokenizer or an "
                "encoder changed after planning? Delete the run's plan folder to plan anew"
            )
        if not self.weightings:
            return document.cut(length)
        return self.weightings[source].weigh(document, shard, row, choice, length)


def read_patiently(read: Callable[[], Sample], name: str) -> Sample:
    """`read()`, tried again when the disk or the network fails; the last failure is raised with the sample's name."""
    wait = FIRST_WAIT
    for attempt in range(RETRIES + 1):
        try:
            return read()
        except (ConnectionError, TimeoutError, OSError) as error:
            if attempt == RETRIES or isinstance(error, FileNotFoundError | PermissionError):
                error.add_note(f"while reading {name}, after {attempt + 1} attempts")
                raise
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")
