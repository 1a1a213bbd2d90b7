"""Samples a second of our `Materialiser` against the loaders that one would pick instead, on the same shards.

    planned      packs of a plan, every sample read at its place in its shard, in an order shuffled over all shards
    webdataset, open_clip, energon      see `benchmarks.loader_arms`

The arms take turns, forwards and backwards, so that a busy machine slows them all; a turn is one pass over all samples.
The whole includes the start of the workers, and of some loaders the filling of a shuffle; what a long training run
sees is the steady time, after the first batch. Before the turns, one pass that is not timed fills the page cache and
checks that all arms give every sample once, with the same captions and the same pixels to the last bit.

Shards and workers share the samples evenly, in whole batches: otherwise the end of a short pass, where one worker still
has a batch to make and the other has none, would weigh more than what differs between the loaders. A sample's processor
time, which counts the workers' too, says what is left of a ratio when other work runs beside.

    python -m benchmarks.loader            photos written for the benchmark, and the drawings of the demo corpus
    python -m benchmarks.loader --quick    few photos and turns, to see that it runs

An arm whose packages are missing is left out with a sentence that names them.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image as Pillow

from benchmarks.loader_arms import ARMS, Contents, Corpus
from benchmarks.train import byte_tokenizer
from mm.data.card import Card
from mm.data.index import Index, index_card
from mm.encoders.adapters import AveragePool
from mm.encoders.vision import ImageTransform
from mm.packing.collate import Entrance, Processor
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.source import QUANTITIES, Rows, Source
from mm.sample import Image, Modality, Text

SHARDS = 4
BATCH = 15  # samples; as many photos fill a pack, and as many drawings on average
CAPACITY = 1024
SIZE = (768, 1024)  # rows and columns of a photo
DRAWINGS = 3600  # the 1841 of the demo corpus, almost twice
DEMO = Path(__file__).parents[1] / "data_cards" / "demo" / "card.yaml"


def photos() -> Iterator[tuple[bytes, str]]:
    """JPEGs of some 200 kB with captions of one length. A photo is noise at two scales."""
    random = np.random.default_rng(0)
    for number in itertools.count():
        yield photo(random), f"photo no. {number:06d}"


def photo(random: np.random.Generator) -> bytes:
    rows, columns = SIZE
    coarse = Pillow.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((columns, rows))
    grain = random.integers(-12, 13, (rows, columns, 1), np.int16)
    pixels = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Pillow.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def drawings(folder: Path) -> Iterator[tuple[bytes, str]]:
    """WebP files of the demo corpus with their captions, which OpenCLIP reads from files of their own only."""
    index = index_card(Card.load(DEMO), "train", folder, progress=False)
    for row in range(index.rows):
        image, text = index.sample(row).parts
        assert isinstance(image, Image)
        assert isinstance(text, Text)
        yield image.data, text.text


def write_corpus(folder: Path, name: str, extension: str, pairs: Iterator[tuple[bytes, str]], samples: int) -> Corpus:
    """The first so many pairs as shards, with all that the arms need to load them."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(shards / f"{name}-{shard}.tar", "w") as tar:
            for row, (picture, caption) in enumerate(itertools.islice(pairs, samples // SHARDS)):
                add(tar, f"{shard}-{row:06d}.{extension}", picture)
                add(tar, f"{shard}-{row:06d}.txt", caption.encode())
    card = {
        "name": name,
        "licence": "see the card of the demo corpus; photos are CC0-1.0",
        "origin": "python -m benchmarks.loader",
        "format": "webdataset",
        "splits": {"train": {"shards": [f"shards/{name}-*.tar"]}},
        "sample": [{"image": extension}, {"text": "txt"}],
    }
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(card, sort_keys=False))
    index, process = index_card(Card.load(path), "train", folder / "index", progress=False), processor()
    plan = make_plan(index, process, folder / "plan")
    return Corpus(shards, extension, index, plan, process, BATCH)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
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
    rows = Rows(np.diff(index.starts), tokens, counts)
    source = Source.of_rows(index.card.name, rows, np.ones(1), index.fingerprint)
    return Plan.open(folder, [source], PackingOptions(capacity=CAPACITY, batch=1), seed=0, epochs=1)


class Pass(NamedTuple):
    """What a pass over all samples took, in seconds.

    whole: by the clock
    steady: by the clock, after the first batch had come
    processor: processor time of this process and its workers
    """

    whole: float
    steady: float
    processor: float


def one_pass(load: Callable[[], Iterable[Any]]) -> Pass:
    gc.collect()
    before, start, first = sum(os.times()[:4]), time.perf_counter(), 0.0
    loader = load()
    for _ in loader:
        first = first or time.perf_counter()
    end = time.perf_counter()
    del loader
    gc.collect()  # ends workers that wait for another epoch: the time of a process is counted when it has ended
    return Pass(end - start, end - first, sum(os.times()[:4]) - before)


def contents(name: str, corpus: Corpus, workers: int) -> Contents:
    """What a pass gives."""
    batches = [ARMS[name].contents(batch) for batch in ARMS[name].load(corpus, workers)]
    return Contents(*map(sum, zip(*batches, strict=True)))


def compare(corpus: Corpus, names: Sequence[str], workers: int, turns: int) -> None:
    """Prints what each arm takes, and how many times as long as ours."""
    found = {name: contents(name, corpus, workers) for name in names}
    if len(set(found.values())) > 1 or found["planned"].samples != corpus.index.rows:
        raise SystemExit(f"the arms do not give the same: {found}, of {corpus.index.rows} samples")
    passes: dict[str, list[Pass]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names[:: -1 if turn % 2 else 1]:
            passes[name].append(one_pass(partial(ARMS[name].load, corpus, workers)))
    title = f"{workers} workers" if workers else "in sequence"
    print(f"  {title:12} samples/s  first batch  processor   planned is as fast, {' / '.join(Pass._fields)}")
    for name in names:
        whole, steady, processor = (statistics.median(times) for times in zip(*passes[name], strict=True))
        line = f"    {name:10} {corpus.index.rows / whole:9.0f} {whole - steady:10.1f} s"
        line += f" {processor / corpus.index.rows * 1e3:7.2f} ms"
        if name != "planned":
            pairs = zip(zip(*passes[name], strict=True), zip(*passes["planned"], strict=True), strict=True)
            line += "   " + " / ".join(ratio(theirs, ours) for theirs, ours in pairs)
        print(line, flush=True)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Median, smallest and largest of the ratios of passes that ran one after the other."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"


def present(names: Sequence[str]) -> list[str]:
    """Ours, and those of the others that the environment has all packages for."""
    for name in names:
        if missing := ARMS[name].missing:
            packages = " ".join(map(repr, missing))
            print(f"{name} is left out: it needs `pip install {packages}`, in a copy of the environment of the suite")
    return ["planned", *(name for name in names if not ARMS[name].missing)]


def main() -> None:
    others = [name for name in ARMS if name != "planned"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few photos and turns: shows that it runs")
    parser.add_argument("--arms", nargs="+", choices=others, default=others, help="loaders to compare ours with")
    parser.add_argument("--workers", type=int, nargs="+", choices=(0, 1, 2, 4), default=[2, 0], help="0: in sequence")
    parser.add_argument("--photos", type=int, default=960, help=f"a multiple of {SHARDS * BATCH}")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if options.photos % (SHARDS * BATCH):
        parser.error(f"--photos {options.photos}: expected a multiple of {SHARDS} shards × {BATCH} a batch")
    number, turns = (SHARDS * BATCH, 2) if options.quick else (options.photos, options.turns)
    names = present(options.arms)
    torch.set_num_threads(1)  # as torch does in loader workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = [write_corpus(folder / "photos", "photos", "jpg", photos(), number)]
        if not options.quick:
            pairs = itertools.cycle(drawings(folder / "demo"))
            corpora.append(write_corpus(folder / "drawings", "drawings", "webp", pairs, DRAWINGS))
        for corpus in corpora:
            print(f"\n{corpus}, {turns} turns")
            for workers in options.workers:
                compare(corpus, names, workers, turns)


if __name__ == "__main__":
    main()
