"""Samples a second of our `Materialiser` against webdataset's own pipeline on the same shards.

    planned      packs of a plan, every sample read at its place in its shard, in an order shuffled over all shards
    webdataset   shards read from end to end, shuffled in a buffer of 1000 samples

Decoding, resizing, tokenising and collating are the same functions in both, and so is torch's loader below both, which
brings batches of as many samples, on average, to the main process. So the ratio says what reading at a place costs.

The arms take turns, so that a busy machine slows both; a turn is one pass over all samples, the start of the workers
included. It is checked that both give every sample once, with the same number of tokens.

    python -m benchmarks.loader            photos written for the benchmark, and the drawings of the demo corpus
    python -m benchmarks.loader --quick    few photos and turns, to see that it runs
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image as Pillow
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset, WebLoader

from benchmarks.train import byte_tokenizer
from mm.data.card import Card
from mm.data.index import Index, index_card
from mm.data.shards import Record
from mm.encoders.adapters import AveragePool
from mm.encoders.vision import ImageTransform
from mm.packing.batch import Batch
from mm.packing.collate import Document, Entrance, Processor
from mm.packing.materialise import Materialiser, MicroStep
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.streams import QUANTITIES, Source
from mm.sample import Modality

SHARDS = 4
SIZE = (768, 1024)  # rows and columns of a photo
CAPACITY = 1024
PREFETCH = 4  # batches a worker
BUFFER = 1000  # samples in webdataset's shuffle
DEMO = Path(__file__).parents[1] / "data_cards" / "demo" / "card.yaml"


def write_photos(folder: Path, number: int) -> Path:
    """Shards of JPEGs with captions; returns their card. A photo is noise at two scales, some 200 kB."""
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"photos-{shard}.tar", "w") as tar:
            for row in range(shard * number // SHARDS, (shard + 1) * number // SHARDS):
                _add(tar, f"{row:06d}.jpg", photo(random))
                _add(tar, f"{row:06d}.txt", b"a photo of noise with the number %d" % row)
    card = {
        "name": "photos",
        "licence": "CC0-1.0",
        "origin": "python -m benchmarks.loader",
        "format": "webdataset",
        "splits": {"train": {"shards": ["photos-*.tar"]}},
        "sample": [{"image": "jpg"}, {"text": "txt"}],
    }
    path = folder / "photos.yaml"
    path.write_text(yaml.safe_dump(card, sort_keys=False))
    return path


def photo(random: np.random.Generator) -> bytes:
    rows, columns = SIZE
    coarse = Pillow.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((columns, rows))
    grain = random.integers(-12, 13, (rows, columns, 1), np.int16)
    pixels = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Pillow.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def processor() -> Processor:
    """Pictures at 224 × 224 as 49 embeddings, text as bytes."""
    entrance = Entrance(ImageTransform((224, 224), (14, 14)), AveragePool(8, 8, tokens=49))
    return Processor(byte_tokenizer(), {Modality.IMAGE: entrance})


def make_plan(index: Index, process: Processor, folder: Path) -> Plan:
    """One epoch of all samples, packed."""
    tokens, counts = np.zeros((index.rows, 1), np.int32), np.zeros((index.rows, len(QUANTITIES)), np.int32)
    for row in range(index.rows):
        images = index.facts(row)
        media = sum(process.media_length(Modality.IMAGE, facts) for facts in images)
        tokens[row] = process.text_length(index.sample(row)).tokens + media
        counts[row, QUANTITIES.index(Modality.IMAGE.label)] = len(images)
    source = Source(
        name=index.card.name,
        shards=np.diff(index.starts),
        tokens=tokens,
        choice_probabilities=np.ones(1),
        counts=counts,
        fingerprint=index.fingerprint,
    )
    return Plan.open(folder, [source], PackingOptions(capacity=CAPACITY, batch=1), seed=0, epochs=1)


def planned(plan: Plan, index: Index, process: Processor, workers: int) -> Iterable[Batch]:
    """Our loader, as `mm.train.loop` makes it."""
    packs = [MicroStep(number, (number,)) for number in range(plan.total_packs() or 0)]
    return DataLoader(
        Materialiser(plan.reader(), [index], process, names=[index.card.name]),
        sampler=packs,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )


def streamed(shards: Sequence[str], card: Card, process: Processor, samples: int, workers: int) -> Iterable[Batch]:
    """webdataset's pipeline, with batches of so many samples."""
    pipeline = WebDataset(list(shards), shardshuffle=len(shards), seed=0).shuffle(BUFFER)
    batches = pipeline.map(partial(to_document, card, process)).batched(samples, partial(collate, process))
    return WebLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None)


def to_document(card: Card, process: Processor, stored: dict[str, Any]) -> Document:
    """A sample of webdataset through the functions that ours goes through."""
    fields = {name: value for name, value in stored.items() if not name.startswith("__")}
    return process.document(card.sample(Record(stored["__key__"], fields)))


def collate(process: Processor, documents: Sequence[Document]) -> Batch:
    return process.collate([documents], [[(0, 0)] * len(documents)])


def one_pass(loader: Iterable[Batch]) -> tuple[float, int, int]:
    """Samples a second, samples and tokens of one pass."""
    samples = tokens = 0
    start = time.perf_counter()
    for batch in loader:
        samples += int((batch.rows[:, 0] >= 0).sum())
        tokens += batch.real_tokens
    return samples / (time.perf_counter() - start), samples, tokens


def compare(card_path: Path, worker_counts: Sequence[int], turns: int, folder: Path) -> None:
    """Prints samples a second of both and their ratio, for each number of workers."""
    card, process = Card.load(card_path), processor()
    index = index_card(card, "train", folder / "index", progress=False)
    plan = make_plan(index, process, folder / "plan")
    shards = [shard.shard for shard in index.shards]
    a_batch = round(index.rows / (plan.total_packs() or 1))
    size = sum(Path(shard).stat().st_size for shard in shards) / index.rows / 1e3
    print(
        f"\n{card.name}: {index.rows} samples of {size:.0f} kB, {len(shards)} shards, {a_batch} a batch, {turns} turns"
    )
    for workers in worker_counts:
        arms: dict[str, Callable[[], Iterable[Batch]]] = {
            "planned": partial(planned, plan, index, process, workers),
            "webdataset": partial(streamed, shards, card, process, a_batch, workers),
        }
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(turns + 1):
            contents = {}
            for name in sorted(arms, reverse=turn % 2 == 1):
                speed, *contents[name] = one_pass(arms[name]())
                if turn:  # the first brings the shards into the page cache
                    speeds[name].append(speed)
            if contents["planned"] != contents["webdataset"] or contents["planned"][0] != index.rows:
                raise SystemExit(f"the arms gave other (samples, tokens): {contents} of {index.rows} samples")
        ratios = [our / their for our, their in zip(speeds["planned"], speeds["webdataset"], strict=True)]
        print(
            f"  {f'{workers} workers' if workers else 'in sequence':12} "
            f"planned {statistics.median(speeds['planned']):6.0f} samples/s, "
            f"webdataset {statistics.median(speeds['webdataset']):6.0f}   "
            f"planned is {statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few photos and turns: shows that it runs")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 0], help="loader processes; 0: in sequence")
    parser.add_argument("--photos", type=int, default=480)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    photos, turns = (48, 2) if options.quick else (options.photos, options.turns)
    torch.set_num_threads(1)  # as torch does in loader workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(write_photos(folder, photos), options.workers, turns, folder / "photos")
        if not options.quick:
            compare(DEMO, options.workers, turns, folder / "demo")


if __name__ == "__main__":
    main()
