"""A small file takes bounded memory and time, whatever it claims: each is read in a process of its own limits."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from mm import media
from mm.data.sources.splits import LONGEST, colours_of
from mm.encoders.speech import SpeechTransform
from mm.media import BrokenMedia, Waveform, decode, facts
from mm.picture_limits import MAX_SIDE
from mm.report.pictures import thumbnail
from mm.sample import Image, PointCloud

MEMORY = 1024  # MiB that reading one file may add
SECONDS = 20  # of processor time

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from mm import media
from mm.data.sources.splits import colours_of
from mm.encoders.vision import ImageTransform
from mm.report.pictures import thumbnail
from mm.sample import Image

resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # of addresses, for the sake of this machine

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def read(data):
    promised, picture = media.facts(Image(data)), media.decode(Image(data))
    assert promised == picture.size
    media.perceptual_hash(picture), colours_of(picture)
    for resize in ("squash", "crop", "pad"):
        ImageTransform((64, 64), (4, 4), resize, "lanczos").prepare(picture)
    del picture
    thumbnail(data)

before, said = megabytes(), {}
for file in Path(sys.argv[1]).iterdir():
    begun = time.process_time()
    try:
        read(file.read_bytes())
        reason = "read"
    except media.BrokenMedia as error:
        reason = str(error)
    except MemoryError:
        reason = "too much memory"
    said[file.name] = [reason, time.process_time() - begun]
print(json.dumps([said, megabytes() - before]))
"""


def encoded(picture: PillowImage.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, colour: int, depth: int, values: int) -> bytes:
    """A PNG of zeros, of a colour type that has so many values a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor, row = zlib.compressobj(9), bytes(1 + width * values * depth // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bmp(width: int, height: int, runs: bytes) -> bytes:
    """A run-length encoded BMP."""
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs


def jpeg(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(PillowImage.new("L", (side, side)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def tiff(tile: int) -> bytes:
    """A TIFF of one pixel, in a tile of many."""
    pixels = zlib.compress(bytes(tile * tile), 9)
    start = 8 + 2 + 10 * 12 + 4
    tags = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, start)]
    tags.append((325, len(pixels)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a wide JPEG": (lambda: encoded(PillowImage.new("RGB", (60_000, 1000)), "JPEG"), "read"),
    "a tall JPEG": (lambda: encoded(PillowImage.new("RGB", (1, 65_500)), "JPEG"), "read"),
    "a PNG of one row": (lambda: png(67_000_000, 1, 0, 1, 1), "67000000 x 1 pixels"),
    "a PNG with transparency": (lambda: png(8192, 8192, 4, 8, 2), "read"),
    "a WebP": (lambda: encoded(PillowImage.new("RGBA", (8192, 4096), (9, 9, 9, 9)), "WEBP", lossless=True), "read"),
    "a larger WebP": (lambda: encoded(PillowImage.new("RGB", (8192, 4100)), "WEBP", lossless=True), "8192 x 4100"),
    "a JPEG of many scans": (lambda: jpeg(4000, 2000), "scans over 4000 x 4000"),
    "a TIFF of one tile": (lambda: tiff(5000), "tiles of 5000 x 5000"),
    "a BMP of ends of lines": (lambda: bmp(8000, 8000, bytes([1, 0, 0, 0]) * 8000 + bytes([0, 1])), "8000 x 8000"),
}


def test_small_files_take_bounded_memory_and_time(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
        assert (tmp_path / name).stat().st_size < 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    said, memory = json.loads(done.stdout)
    for name, (_, expected) in BOMBS.items():
        reason, seconds = said[name]
        assert expected in reason, name
        assert seconds < SECONDS, name
    assert memory < MEMORY


def test_colours_of_a_long_picture_are_those_of_the_same_picture_drawn_smaller() -> None:
    y, x = np.mgrid[0:64, 0 : 2 * LONGEST]
    strip = PillowImage.fromarray(np.stack([x // 32, 4 * y, x % 7], axis=-1).astype(np.uint8))
    smaller = strip.resize((LONGEST, 32), PillowImage.Resampling.BOX)
    assert np.array_equal(colours_of(strip), colours_of(smaller))
    assert colours_of(PillowImage.new("RGB", (MAX_SIDE, 1))).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "CMYK", "I;16", "1"])
def test_a_picture_converted_strip_by_strip_is_the_one_converted_at_once(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 20, 4), np.uint8)
    if mode == "I;16":
        picture = PillowImage.fromarray(np.random.default_rng(0).integers(0, 65_536, (33, 20)).astype(np.uint16))
    else:
        picture = PillowImage.fromarray(pixels, "RGBA").convert("RGB" if mode in "PCMYK1" else "RGBA").convert(mode)
    data = encoded(picture, "TIFF")
    monkeypatch.setattr(media, "_STRIP", 20 * 33)
    at_once = np.asarray(decode(Image(data)))
    monkeypatch.setattr(media, "_STRIP", 20 * 4)
    assert np.array_equal(np.asarray(decode(Image(data))), at_once)


def test_a_jpeg_of_many_exif_blocks_is_broken_at_once_and_one_of_several_is_read() -> None:
    plain = encoded(PillowImage.new("RGB", (8, 9)), "JPEG")
    block = b"\xff\xe1\0\x12Exif\0\0" + b"II*\0abcdef"
    assert facts(Image(plain[:2] + block * 100 + plain[2:])) == (8, 9)
    with pytest.raises(BrokenMedia, match="JPEG of 20000 blocks of EXIF data"):
        facts(Image(plain[:2] + block * 20_000 + plain[2:]))


def test_damaged_tags_of_a_picture_print_nothing(tmp_path: Path) -> None:
    data, tags = tiff(8), 500
    count = 10 + tags
    (start,) = struct.unpack_from("<I", data, 4)
    more = b"".join(struct.pack("<HHII", 1000 + tag, 7, len(data), 0) for tag in range(tags))
    entries = data[start + 2 : start + 2 + 120] + more
    whole = data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count) + entries + bytes(4)
    (tmp_path / "0.tif").write_bytes(whole)
    program = (
        "import sys; from mm import media, sample; print(media.facts(sample.Image(open(sys.argv[1], 'rb').read())))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "0.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ImageFacts(width=1, height=1)\n", "")


def test_what_a_picture_carries_along_does_not_reach_what_is_made_of_it() -> None:
    """A long comment of a GIF ended a report: as JPEG, its thumbnail could not be saved."""
    gif = encoded(PillowImage.new("P", (8, 8)), "GIF")
    long = gif.replace(b"\x2c", b"\x21\xfe" + (b"\xff" + b"c" * 255) * 300 + b"\0\x2c", 1)
    picture = decode(Image(long))
    assert isinstance(picture, PillowImage.Image)
    assert picture.info == {}
    assert thumbnail(long).startswith("data:image/jpeg")


@pytest.mark.parametrize("rate", [999_983, 2**31 - 1])
def test_a_rate_whose_filter_would_fill_the_memory_is_broken(rate: int) -> None:
    with pytest.raises(BrokenMedia, match=f"sampling rate of {rate} Hz"):
        SpeechTransform().prepare(Waveform(np.zeros(100, np.float32), rate))


# ------------------------------------------------------------------------------------------------------------- points


def npy(header: str, body: bytes = bytes(72), version: int = 1) -> bytes:
    text = header.encode("utf-8" if version == 3 else "latin1") + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


def headers() -> Iterator[tuple[str, str]]:
    shapes = [
        "(True, 3)",
        "(3, True)",
        "(-1, 3)",
        "(2**70, 3)",
        "(0x" + "f" * 6000 + ", 3)",
        "(-0x" + "f" * 6000 + ", 3)",
    ]
    shapes += ["(9223372036854775807, 6)", "(3,)", "()", "(3, 3.0)", "('3', 3)", "(3, 3, 1)", "[3, 3]", "3"]
    yield from (("'<f4'", shape) for shape in shapes)
    kinds = [
        "[('x', '<f4'), ('y', '<f4')]",
        "'O'",
        "'<c8'",
        "'?'",
        "'S4'",
        "'<M8[s]'",
        "('<f4', (3,))",
        "'|V4'",
        "None",
    ]
    yield from ((kind, "(3, 3)") for kind in kinds)


@pytest.mark.parametrize(("kind", "shape"), headers())
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_header_that_is_no_cloud_is_broken(kind: str, shape: str, version: int) -> None:
    data = npy(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}", version=version)
    for read in (facts, decode):
        with pytest.raises(BrokenMedia) as error:
            read(PointCloud(data))
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2", "<i8", ">u2", "|i1"])
@pytest.mark.parametrize("fortran", [True, False])
def test_every_version_byte_order_and_layout_of_numbers_is_read(version: int, kind: str, fortran: bool) -> None:
    values = np.arange(18).reshape(6, 3).astype(kind)
    header = f"{{'descr': {kind!r}, 'fortran_order': {fortran}, 'shape': (6, 3)}}"
    data = npy(header, values.tobytes("F" if fortran else "C"), version)
    item = decode(PointCloud(data))
    assert isinstance(item, np.ndarray)
    assert facts(PointCloud(data)) == item.shape
    assert np.array_equal(item, values.astype(np.float32))


def test_a_header_of_a_megabyte_is_broken() -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 3)}" + " " * 2**20
    with pytest.raises(BrokenMedia, match="unreadable"):
        facts(PointCloud(npy(header, version=2)))
