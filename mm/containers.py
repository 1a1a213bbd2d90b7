"""The containers of recordings: whether all of a file is there, and whether its header gives the true length.

libsndfile shortens a recording to what is there, silently. Half a recording next to a whole transcript is a wrong
sample, so the sizes that a container states are compared with the file. Programs that write into a pipe cannot state
them:

    RIFF, RIFX   0 or about the largest number as size of the file and of the samples
    RF64         0 or -1 in the ``ds64`` chunk
    FLAC         0 samples in all, which libsndfile gives as the largest number of frames
    OGG          no position on the last page

Such a recording is decoded once for its length, as MP3 is. What MP3 states is an estimate, and it cannot tell that its
end is missing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from mm.sample import BrokenMedia

STREAMED = 0x7FFF_0000
"""Sizes from this one on are written by programs that do not know the size (SoX 0x7FFFF000, arecord 2³¹, ffmpeg
2³² − 1). A recording of so many bytes is over the limits."""

UNKNOWN = 2**62
"""Frames from this number on are what libsndfile gives where the header says nothing."""


ByteOrder = Literal["big", "little"]


class Container(NamedTuple):
    """A recording whose container is whole.

    data: the file; sizes that it leaves open are filled in, so that libsndfile reads to its end
    exact: whether its header states the length
    """

    data: bytes
    exact: bool


def whole(data: bytes) -> Container:
    """Return the container of a recording.

    Raises:
        BrokenMedia: the file is shorter than it states, or an OGG stream has no end.
    """
    if data[:4] in (b"RIFF", b"RIFX"):
        return _riff(data)
    if data[:4] == b"RF64" and data[12:16] == b"ds64":
        return _rf64(data)
    if data[:4] == b"OggS":
        return _ogg(data)
    return Container(data, exact=True)


def _riff(data: bytes) -> Container:
    order: ByteOrder = "big" if data[:4] == b"RIFX" else "little"
    size = int.from_bytes(data[4:8], order)
    open_ended = size == 0 or size >= STREAMED
    if not open_ended:
        _require(data, size + 8)
    samples = _samples(data, order)
    if samples is None:
        return Container(data, exact=True)  # libsndfile says what is wrong with it
    stated, there = int.from_bytes(data[samples - 4 : samples], order), len(data) - samples
    if stated >= STREAMED or (stated == 0 and open_ended):
        return Container(data[: samples - 4] + there.to_bytes(4, order) + data[samples:], exact=False)
    _require(data, samples + stated)
    return Container(data, exact=True)


def _rf64(data: bytes) -> Container:
    """EBU Tech 3306, section 4: 64-bit sizes of the file and of the samples, and the number of frames."""
    size, stated = (int.from_bytes(data[at : at + 8], "little") for at in (20, 28))
    if 0 < size < UNKNOWN:
        _require(data, size + 8)
    samples = _samples(data, "little")
    if samples is None:
        return Container(data, exact=True)
    if 0 < stated < UNKNOWN:
        _require(data, samples + stated)
        return Container(data, exact=True)
    there = len(data) - samples
    numbers = (len(data) - 8, there, 0)
    sizes = b"".join(number.to_bytes(8, "little") for number in numbers)
    return Container(data[:20] + sizes + data[44:], exact=False)


def _samples(data: bytes, order: ByteOrder) -> int | None:
    """Where the samples of a RIFF begin, or None."""
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == b"data":
            return at + 8
        size = int.from_bytes(data[at + 4 : at + 8], order)
        at += 8 + size + size % 2
    return None


def _ogg(data: bytes) -> Container:
    """RFC 3533, section 6: flags at byte 5 of a page, position at 6, stream at 14, checksum at 22, segments at 26."""
    last = data.rfind(b"OggS")
    page = data[last:]
    ends = len(page) > 26 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not ends:
        raise BrokenMedia("truncated recording: the OGG stream has no end")
    if 0 < _position(page) >= _last_position_before(data, last):
        return Container(data, exact=True)
    changed = bytearray(page)
    changed[6:14] = UNKNOWN.to_bytes(8, "little")
    changed[22:26] = bytes(4)
    changed[22:26] = _checksum(changed).to_bytes(4, "little")
    return Container(data[:last] + bytes(changed), exact=False)


def _position(page: bytes) -> int:
    return int.from_bytes(page[6:14], "little", signed=True)


def _last_position_before(data: bytes, last: int) -> int:
    """The highest position of the pages of the stream that the page at `last` ends; 0 without any."""
    stream, at, highest = data[last + 14 : last + 18], 0, 0
    while at < last and data[at : at + 4] == b"OggS":
        if data[at + 14 : at + 18] == stream:
            highest = max(highest, _position(data[at : at + 14]))
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return highest


def _checksum(page: bytes | bytearray) -> int:
    """CRC-32 of an OGG page: polynomial 0x04C11DB7, not reflected, unlike `zlib.crc32`."""
    table, value = _checksums(), 0
    for byte in page:
        value = (value << 8) & 0xFFFF_FFFF ^ table[value >> 24 ^ byte]
    return value


@lru_cache(maxsize=1)
def _checksums() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C1_1DB7 if value >> 31 else 0)) & 0xFFFF_FFFF
        table.append(value)
    return table


def _require(data: bytes, size: int) -> None:
    if size > len(data):
        raise BrokenMedia(f"truncated recording: {len(data)} of {size} bytes")
