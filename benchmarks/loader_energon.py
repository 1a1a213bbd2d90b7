"""Megatron-Energon over the shards of `benchmarks.loader`: prepared by its own command, loaded as in its quickstart."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.tools.prepare import command

from benchmarks.loader_arms import BUFFER, PREFETCH, Corpus, collate, to_document
from mm.packing.batch import Batch
from mm.packing.collate import Document

SEQUENCE = 100  # samples read one after another before the reader goes on elsewhere, as in the quickstart


class Documents(DefaultTaskEncoder):
    """Samples become documents, and documents batches, by the functions that all arms share."""

    decoder = None  # pictures stay bytes

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.corpus = corpus

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> Document:
        stored = {"__key__": sample.__key__, self.corpus.extension: sample.image, "txt": sample.caption}
        return to_document(self.corpus.index.card, self.corpus.processor, stored)

    @stateless
    def batch(self, samples: list[Document]) -> Batch:
        return collate(self.corpus.processor, samples)


def load(corpus: Corpus, workers: int) -> Iterable[Batch]:
    """Batches of one epoch; the first call makes Energon's index of the shards."""
    if not (corpus.folder / ".nv-meta").exists():
        prepare(corpus.folder, corpus.extension)
    dataset = get_train_dataset(
        corpus.folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=corpus.batch,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=SEQUENCE,
        task_encoder=Documents(corpus),
        repeat=False,
    )
    return get_loader(dataset, prefetch_factor=PREFETCH)


def prepare(folder: Path, extension: str) -> None:
    """``energon prepare``, which asks for nothing."""
    fields = json.dumps({"image": extension, "caption": "txt"})
    arguments = [str(folder), "--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--num-workers", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        command.main([*arguments, "--sample-type", "CaptioningSample", "--field-map", fields], standalone_mode=False)
