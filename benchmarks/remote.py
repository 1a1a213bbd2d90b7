"""What shards cost to read: requests and bytes of remote ones, in place and through a cache, as a local HTTP server
counts them, and the processor's time of local ones.

The samples are read in shuffled order over all shards, as within a block of a plan. Of parquet, decoded row groups are
kept up to a sixteenth of the shards, as 256 MiB are of eight shards of 500 MB.

    python -m benchmarks.remote
"""

from __future__ import annotations

import argparse
import http.server
import io
import logging
import tarfile
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mm.data import columns
from mm.data import parquet as parquet_module
from mm.data.cache import ShardCache
from mm.data.card import Card
from mm.data.index import Index, index_card
from mm.sample import Sample

ROW_GROUP = 100  # rows


class CountingServer(http.server.ThreadingHTTPServer):
    """Serves a folder by ranges and counts requests and bytes of bodies."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests, self.sent, self.lock = folder, 0, 0, threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: CountingServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        size = path.stat().st_size
        low, _, high = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        first, last = int(low), min(int(high), size - 1)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{size}"')
        self.end_headers()
        with self.server.lock:
            self.server.requests += 1
            self.server.sent += body * (last + 1 - first)
        if body:
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last + 1 - first))


def write_shards(folder: Path, format: str, shards: int, samples: int, url: str) -> Path:
    """Shards of pictures of noise (some 20 kB) with captions, and their card."""
    draw = np.random.default_rng(0)
    pictures = []
    for side in draw.integers(120, 200, 50).tolist():
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    for shard in range(shards):
        chosen = [pictures[number] for number in draw.integers(0, len(pictures), samples)]
        texts = [f"caption {number} of shard {shard}" for number in range(samples)]
        if format == "parquet":
            table = pa.table({"jpg": chosen, "txt": texts})
            pq.write_table(
                table, folder / f"{shard}.parquet", row_group_size=ROW_GROUP, compression="none", use_dictionary=False
            )
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, (picture, text) in enumerate(zip(chosen, texts, strict=True)):
                for name, data in (("jpg", picture), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    suffix = "parquet" if format == "parquet" else "tar"
    card = {
        "name": "remote",
        "licence": "CC0",
        "origin": "benchmarks/remote.py",
        "format": format,
        "splits": {"train": {"shards": [f"{url}/{{0..{shards - 1}}}.{suffix}"]}},
        "sample": [{"image": "jpg"}, {"text": "txt"}],
    }
    path = folder / "remote.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


def length(sample: Sample) -> int:
    return len(sample.parts)


def shuffled_epoch(index: Index, seed: int) -> None:
    for row in np.random.default_rng(seed).permutation(index.rows).tolist():
        index.sample(row)


def with_cache(card: Card, limit: float | None, folder: Path, size: int) -> tuple[Card, str]:
    """The card with a cache of a share of its shards, and what to call that."""
    if limit is None:
        return card, "in place"
    return replace(card, cache=ShardCache(folder / "cache", int(limit * size))), f"cache, {limit:.0%}"


def measure_remote(format: str, shards: int, samples: int, limit: float | None) -> None:
    """Prints a line a phase. `limit`: of the cache, as a share of the shards; None reads in place."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "served"
        folder.mkdir()
        server = CountingServer(folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        card = Card.load(write_shards(folder, format, shards, samples, url))
        size = sum(file.stat().st_size for file in folder.iterdir())
        parquet_module.ROW_GROUP_CACHE = size // 16
        card, how = with_cache(card, limit, Path(temporary), size)

        def phase(name: str) -> None:
            each, share = server.requests / (shards * samples), server.sent / size
            print(f"| {format} | {how} | {name} | {each:.3f} | {share:.2f} |", flush=True)
            server.requests = server.sent = 0

        index = index_card(card, "train", Path(temporary) / "index", progress=False)
        phase("index")
        columns.compute(index, "length", "1", length, pa.int32(), progress=False)
        phase("text lengths")
        for epoch in range(2):
            shuffled_epoch(index, epoch)
            phase(f"epoch {epoch + 1}")
        server.shutdown()


def measure_local(format: str, shards: int, samples: int, limit: float | None, epochs: int = 5) -> None:
    """Prints the processor's time for a sample in the first epoch, and in those after it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        folder.mkdir()
        card = Card.load(write_shards(folder, format, shards, samples, str(folder)))
        size = sum(file.stat().st_size for file in folder.iterdir())
        parquet_module.ROW_GROUP_CACHE = size // 16
        card, how = with_cache(card, limit, Path(temporary), size)
        index = index_card(card, "train", Path(temporary) / "index", progress=False)
        spent = []
        for epoch in range(epochs):
            began = time.process_time()
            shuffled_epoch(index, epoch)
            spent.append((time.process_time() - began) / index.rows * 1e6)
        later = sorted(spent[1:])
        print(
            f"| {format} | {how} | {spent[0]:.0f} | {np.median(later):.0f} ({later[0]:.0f} to {later[-1]:.0f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=400, help="a shard")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| format | read | phase | requests a sample | bytes / bytes of the shards |")
    for format in ("webdataset", "parquet"):
        for limit in (None, 1.1, 0.5):
            measure_remote(format, options.shards, options.samples, limit)
    print("\n| format, local | read | µs of CPU a sample, first epoch | later epochs |")
    for format, limit in (("webdataset", None), ("parquet", None), ("parquet", 1.1)):
        measure_local(format, options.shards, options.samples, limit)


if __name__ == "__main__":
    main()
