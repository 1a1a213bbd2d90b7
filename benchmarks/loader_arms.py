"""Four ways to load the same shards: ours, and three that one would pick instead.

    planned      our `Materialiser`: packs of a plan, every sample read at its place in its shard
    webdataset   webdataset's pipeline: shards read from end to end, shuffled in a buffer, 15 samples a batch
    open_clip    the pipeline that OpenCLIP trains with, `open_clip_train.data.get_wds_dataset`
    energon      Megatron-Energon's loader, over the index that `energon prepare` makes of the shards

Pictures go through the same `ImageTransform`, captions through the same tokenizer. webdataset and Energon give the
bytes of a sample to our `Processor` and collate as ours does. OpenCLIP's pipeline has no place for that: it opens the
picture itself, and its batch is the pixels beside ids filled up to a fixed length.
"""

from __future__ import annotations

import importlib.metadata
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset, WebLoader

from mm.data.card import Card
from mm.data.index import Index, SplitSamples
from mm.data.shards import Record
from mm.encoders.vision import ImageTransform
from mm.packing.batch import Batch
from mm.packing.collate import Document, Processor
from mm.packing.materialise import Materialiser, MicroStep
from mm.packing.plan import Plan
from mm.sample import Modality, Sample, Text

PREFETCH = 4  # batches a worker
BUFFER = 1000  # samples in the shuffles of webdataset and Energon; OpenCLIP's own is 5000
CONTEXT = 77  # ids of a caption in OpenCLIP's batch, as CLIP has them


@dataclass(frozen=True)
class Corpus:
    """What all arms load.

    folder: holds the shards and nothing else
    extension: of the pictures
    batch: samples a batch; a pack of the plan holds as many on average
    """

    folder: Path
    extension: str
    index: Index
    plan: Plan
    processor: Processor
    batch: int

    def __str__(self) -> str:
        rows = self.index.rows
        size = sum(Path(shard).stat().st_size for shard in self.shards) / rows / 1e3
        batches = f"{self.plan.total_packs()} packs or {rows // self.batch} batches of {self.batch}"
        return f"{self.index.card.name}: {rows} samples of {size:.0f} kB in {len(self.shards)} shards, {batches}"

    @property
    def shards(self) -> list[str]:
        return [shard.shard for shard in self.index.shards]

    @property
    def samples(self) -> SplitSamples:
        return SplitSamples(self.index.card, self.index.split, self.index.folder, self.shards, self.index)

    @property
    def transform(self) -> ImageTransform:
        transform = self.processor.entrance(Modality.IMAGE).transform
        assert isinstance(transform, ImageTransform)
        return transform


class Contents(NamedTuple):
    """What must be the same in all arms: samples, tokens of their captions, and the sum of their pixels."""

    samples: int
    tokens: int
    pixels: int


def planned(corpus: Corpus, workers: int) -> Iterable[Batch]:
    """Our loader, as `mm.train.loop` makes it."""
    packs = [MicroStep(number, (number,)) for number in range(corpus.plan.total_packs() or 0)]
    return DataLoader(
        Materialiser(corpus.plan.reader(), [corpus.samples], corpus.processor, names=[corpus.index.card.name]),
        sampler=packs,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )


def webdataset(corpus: Corpus, workers: int) -> Iterable[Batch]:
    """webdataset's pipeline, as its documentation has it."""
    pipeline = WebDataset(corpus.shards, shardshuffle=len(corpus.shards)).shuffle(BUFFER)
    documents = pipeline.map(partial(to_document, corpus.index.card, corpus.processor))
    batches = documents.batched(corpus.batch, partial(collate, corpus.processor))
    return WebLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None)


def to_document(card: Card, processor: Processor, stored: dict[str, Any]) -> Document:
    """A sample of webdataset through the functions that ours goes through."""
    fields = {name: value for name, value in stored.items() if not name.startswith("__")}
    return processor.document(card.sample(Record(stored["__key__"], fields)))


def collate(processor: Processor, documents: Sequence[Document]) -> Batch:
    return processor.collate([documents], [[(0, 0, 0)] * len(documents)])


def open_clip(corpus: Corpus, workers: int) -> Iterable[tuple[Tensor, Tensor]]:
    """OpenCLIP's loader of one epoch of training, as its `get_data` makes it."""
    from open_clip_train.data import get_wds_dataset

    options = Namespace(
        train_data="::".join(corpus.shards),
        train_num_samples=corpus.index.rows,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=corpus.batch,
        workers=workers,
        world_size=1,
    )
    tokenizer = partial(to_context, corpus.processor)
    return get_wds_dataset(options, corpus.transform.prepare, is_train=True, tokenizer=tokenizer).dataloader


def to_context(processor: Processor, text: str) -> Tensor:
    """(1, CONTEXT) int64: the ids of a caption, then -1."""
    ids = [number for piece in processor.text.render(Sample("", "", (Text(text),))) for number in piece.ids]
    return torch.tensor([ids + [-1] * (CONTEXT - len(ids))])


def energon(corpus: Corpus, workers: int) -> Iterable[Batch]:
    """Energon's loader of one epoch of training."""
    from benchmarks.loader_energon import load

    return load(corpus, workers)


def batch_contents(batch: Batch) -> Contents:
    pixels = batch.media[Modality.IMAGE].inputs["pixels"]
    slots = len(batch.media[Modality.IMAGE].slots)
    return Contents(int((batch.rows[:, 0] >= 0).sum()), batch.real_tokens - slots, int(pixels.sum()))


def pair_contents(batch: tuple[Tensor, Tensor]) -> Contents:
    pixels, ids = batch
    return Contents(len(pixels), int((ids >= 0).sum()), int(pixels.sum()))


class Arm(NamedTuple):
    """A loader.

    load: batches of one epoch, made by so many worker processes; 0 makes them in the process itself
    contents: what is in one of its batches
    needs: what it requires of an environment beyond what the suite brings along
    """

    load: Callable[[Corpus, int], Iterable[Any]]
    contents: Callable[[Any], Contents]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [need for need in self.needs if not is_installed(Requirement(need))]


def is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name))
    except importlib.metadata.PackageNotFoundError:
        return False


ARMS = {
    "planned": Arm(planned, batch_contents),
    "webdataset": Arm(webdataset, batch_contents),
    # With later webdatasets it stops at the end of the first shard (mlfoundations/open_clip#935).
    "open_clip": Arm(open_clip, pair_contents, ("pandas", "webdataset<=0.2.86")),
    "energon": Arm(energon, batch_contents, ("megatron-energon",)),
}
