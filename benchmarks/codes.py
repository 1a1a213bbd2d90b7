"""Training that reads codes against training that reads pictures: processor time of a sample, from shard to document.

    python -m benchmarks.codes

Every sample is a JPEG of 256 × 256 pixels and a caption, in shards of 500, in shuffled order, all in the page cache.
Codes are the 1,024 of the tests' tokenizer, so that only their number is like that of a real one.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from mm import media
from mm.allow import allow
from mm.data import columns
from mm.data.card import Card
from mm.data.codes import CodedSamples
from mm.data.index import Index, SplitSamples, index_card
from mm.data.tar import BLOCK
from mm.packing.collate import Processor, Spelling
from mm.sample import Modality
from mm.score.tokenize import TokenizerScorer, tokenize
from mm.tokenizers.text import TextTokenizer
from mm.tokenizers.vocabulary import Vocabulary
from tests.patch_colours import PatchColours
from tests.shard_files import write_card, write_tar
from tests.small_world import write_tokenizer

SPEC = {"_target_": "tests.patch_colours.PatchColours"}
ROWS = 500  # of a shard
Read = Callable[[int, int], object]


def write_corpus(folder: Path, shards: int) -> Index:
    draw = np.random.default_rng(0)
    names = []
    for shard in range(shards):
        members = []
        for row in range(ROWS):
            pixels = PillowImage.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).resize((256, 256))
            stream = io.BytesIO()
            pixels.save(stream, "JPEG", quality=90)
            members += [(f"{row:06d}.jpg", stream.getvalue()), (f"{row:06d}.txt", b"a caption of some words")]
        names.append(write_tar(folder / f"{shard}.tar", members).name)
    card = write_card(folder, names, [{"image": "jpg"}, {"text": "txt"}])
    return index_card(Card.load(card), "train", folder / "index", progress=False)


def passing_over_pictures(index: Index) -> Read:
    """Reads a record of a local tar header by header, and of its members all but the pictures."""
    files = [os.open(entry.shard, os.O_RDONLY) for entry in index.shards]
    places = index.place.reshape(len(files), ROWS, 2).tolist()

    def read(shard: int, row: int) -> list[bytes]:
        position, size = places[shard][row]
        end, found = position + size, []
        while position < end:
            header = os.pread(files[shard], BLOCK, position)
            length = int(header[124:135], 8)
            if not header[:100].rstrip(b"\0").endswith(b".jpg"):
                found.append(os.pread(files[shard], length, position + BLOCK))
            position += BLOCK + -(-length // BLOCK) * BLOCK
        return found

    return read


def arms_of(index: Index, text: TextTokenizer) -> dict[str, Read]:
    tokenizer, column = PatchColours(), TokenizerScorer(SPEC).column
    book = Vocabulary.of(text.vocabulary, {Modality.IMAGE: column.size}).codebooks[Modality.IMAGE]
    processor = Processor(text, {Modality.IMAGE: Spelling(tokenizer.transform, book, column.tokenizer)})
    pictures = SplitSamples(index.card, "train", index.folder, [entry.shard for entry in index.shards], index)
    codes = CodedSamples(pictures, [column])

    def decoded(shard: int, row: int) -> object:
        return [tokenizer.transform.prepare(media.decode(one)) for one in pictures.sample(shard, row).media]

    def cold(shard: int, row: int) -> object:
        return CodedSamples(pictures, [column]).sample(shard, row)

    return {
        "read with its picture": pictures.sample,
        "and decode, prepare": decoded,
        "read with its codes": codes.sample,
        "and lay out as a document": lambda shard, row: processor.document(codes.sample(shard, row)),
        "read with its codes, none in memory": cold,
        "read the record without its picture": passing_over_pictures(index),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    allow(["tests"])  # whose tokenizer of pictures makes the codes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = write_corpus(folder, options.shards)
        begun = time.perf_counter()
        counts = tokenize(index, SPEC, progress=False)
        print(f"tokenize: {counts.items / (time.perf_counter() - begun):.0f} pictures a second, decoding included")
        column = TokenizerScorer(SPEC).column
        files = columns.column_folder(index.folder, column.name, column.fingerprint).glob("*.parquet")
        print(f"column: {sum(file.stat().st_size for file in files) / counts.codes:.2f} bytes a code")
        arms = arms_of(index, TextTokenizer.load(str(write_tokenizer(folder / "tokenizer"))))
        rows = random.Random(0).sample([(s, r) for s in range(options.shards) for r in range(ROWS)], 500)
        taken: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(options.turns):
            for arm, read in arms.items():
                begun = time.process_time()
                for shard, row in rows:
                    read(shard, row)
                taken[arm].append((time.process_time() - begun) / len(rows) * 1e6)
        for arm, times in taken.items():
            print(f"{arm:38} {np.median(times):7.0f} µs ({min(times):.0f} to {max(times):.0f})")
        ratios = [
            one / other
            for one, other in zip(taken["and decode, prepare"], taken["and lay out as a document"], strict=True)
        ]
        print(f"pictures / codes: {np.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
