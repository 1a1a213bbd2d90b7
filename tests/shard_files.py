"""Real shards and cards for tests, small enough to be written anew in each."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image as PillowImage

from mm.sample import Sample, Text

Members = Iterable[tuple[str, bytes]]


def jpeg(width: int = 32, height: int = 24, colour: str = "red", format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    PillowImage.new("RGB", (width, height), colour).save(stream, format)
    return stream.getvalue()


def wav(frames: int = 800, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(frames, np.int16), rate, format="WAV")
    return stream.getvalue()


def cloud(number: int = 7, channels: int = 3) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((number, channels), np.float32))
    return stream.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pairs(number: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of caption pairs. Sample i has a picture i + 8 pixels wide and the caption ``caption i``."""
    members = []
    for i in range(first, first + number):
        members.append((f"{i:06d}.jpg", jpeg(i + 8, 9)))
        members.append((f"{i:06d}.txt", f"caption {i}".encode()))
    return members


CAPTION_PAIRS = [{"image": ["webp", "jpg"]}, {"text": "txt"}]


def write_card(
    folder: Path,
    shards: str | list[str],
    sample: Any = None,
    format: str = "webdataset",
    name: str = "pairs",
    **more: Any,
) -> Path:
    card = {
        "name": name,
        "licence": "CC0",
        "origin": "written by a test",
        "format": format,
        "splits": {"train": {"shards": shards}},
        "sample": CAPTION_PAIRS if sample is None else sample,
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(card, sort_keys=False))
    return path


def as_json(value: Mapping[str, Any] | list[Any]) -> bytes:
    return json.dumps(value).encode()


def words(sample: Sample) -> list[str]:
    return [part.text for part in sample.parts if isinstance(part, Text)]


def text_length(sample: Sample) -> int:
    return sum(map(len, words(sample)))


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback interface, with ranges unless told otherwise, failing as often as told."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _RangeHandler)
        self.folder, self.ranges, self.failures, self.version = folder, True, 0, "v1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _RangeHandler(http.server.BaseHTTPRequestHandler):
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file() or (body and self.server.failures > 0):
            self.server.failures -= 1
            self.send_error(503 if path.is_file() else 404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        status, first, last = 200, 0, len(data) - 1
        if wanted and self.server.ranges:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            status, first, last = 206, int(low), min(int(high or last), last)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", self.server.version)
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])
