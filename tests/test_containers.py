"""Recordings whose header does not know their length are decoded once for it, and cut ones are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from mm.containers import STREAMED, _checksum
from mm.media import BrokenMedia, SpeechFacts, Waveform, decode, facts
from mm.sample import Speech

FRAMES = 30_000
NOISE = (0.3 * np.random.default_rng(0).standard_normal(FRAMES)).clip(-1, 1).astype(np.float32)
FULL = 0xFFFF_FFFF


def recording(format: str, subtype: str | None = None, values: np.ndarray = NOISE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, values, 16_000, format=format, subtype=subtype)
    return stream.getvalue()


def length(data: bytes) -> int:
    """Frames of a recording, by its facts and by decoding it."""
    item = decode(Speech(data))
    assert isinstance(item, Waveform)
    assert facts(Speech(data)) == SpeechFacts(len(item.samples), item.rate)
    return len(item.samples)


def refused(data: bytes, reason: str) -> None:
    for read in (facts, decode):
        with pytest.raises(BrokenMedia, match=reason):
            read(Speech(data))


def wav(riff: int | None = None, samples: int | None = None, data: bytes | None = None) -> bytes:
    """A WAV with these sizes in its header."""
    data = data or recording("WAV")
    riff, samples = (len(data) - 8 if riff is None else riff), (len(data) - 44 if samples is None else samples)
    return data[:4] + riff.to_bytes(4, "little") + data[8:40] + samples.to_bytes(4, "little") + data[44:]


def flac(total: int, checksum: bool = True) -> bytes:
    """A FLAC that states this number of samples, with or without the MD5 sum of its samples."""
    data = bytearray(recording("FLAC"))
    data[21:26] = ((int.from_bytes(data[21:26], "big") >> 36 << 36) | total).to_bytes(5, "big")
    if not checksum:
        data[26:42] = bytes(16)
    return bytes(data)


def ogg(position: int, subtype: str = "VORBIS") -> bytes:
    """An OGG whose last page states this position."""
    data = bytearray(recording("OGG", subtype))
    page = data.rfind(b"OggS")
    data[page + 6 : page + 14] = position.to_bytes(8, "little", signed=True)
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = _checksum(data[page:]).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("riff", [0, FULL, 0x7FFF_F024, 0x8000_0024])
@pytest.mark.parametrize("samples", [None, 0, FULL, 0x7FFF_F000, 0x8000_0000])
def test_a_wav_that_was_streamed_is_read_to_its_end(riff: int, samples: int | None) -> None:
    assert length(wav(riff, samples)) == FRAMES


@pytest.mark.parametrize("samples", [FULL, STREAMED])
def test_a_wav_may_know_its_own_size_and_not_that_of_its_samples(samples: int) -> None:
    assert length(wav(samples=samples)) == FRAMES


def test_a_finished_wav_without_samples_is_empty() -> None:
    refused(wav(samples=0), "without samples")


@pytest.mark.parametrize("riff", [None, 0, FULL])
def test_a_wav_with_less_samples_than_it_states_is_truncated(riff: int | None) -> None:
    refused(wav(riff)[:40_000], "truncated recording: 40000 of 60044 bytes")
    refused(wav(riff, samples=2 * FRAMES + 2), "truncated")


@pytest.mark.parametrize("unknown", [bytes(24), b"\xff" * 24], ids=["0", "-1"])
def test_an_rf64_of_unknown_length_is_read_to_its_end(unknown: bytes) -> None:
    data = recording("RF64")
    assert length(data) == FRAMES
    assert length(data[:20] + unknown + data[44:]) == FRAMES


def test_a_truncated_rf64_is_broken() -> None:
    refused(recording("RF64")[:40_000], "truncated")


@pytest.mark.parametrize("checksum", [True, False])
def test_a_flac_of_unknown_length_is_read_to_its_end(checksum: bool) -> None:
    assert length(flac(0, checksum)) == FRAMES
    item = decode(Speech(flac(0, checksum)))
    assert isinstance(item, Waveform)
    assert np.abs(item.samples - NOISE).max() < 1e-4


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_flac_of_unknown_length_is_broken(part: float) -> None:
    data = flac(0, checksum=False)
    refused(data[: int(len(data) * part)], "undecodable|truncated|without samples")


def test_a_flac_that_states_more_than_it_holds_is_broken() -> None:
    with pytest.raises(BrokenMedia, match="truncated"):
        decode(Speech(flac(FRAMES + 10_000)))
    refused(flac(2**36 - 1), "too long")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("position", [-1, 0, 400])
def test_an_ogg_without_its_last_position_is_read_to_its_end(subtype: str, position: int) -> None:
    """Only that position says how many frames of the last block are no part of the recording."""
    assert FRAMES <= length(ogg(position, subtype)) < FRAMES + 1024


def test_the_checksum_is_that_of_ogg() -> None:
    data = recording("OGG", "VORBIS")
    page = data[data.rfind(b"OggS") :]
    assert _checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(page[22:26], "little")


@pytest.mark.parametrize(("at", "size", "value"), [(24, 4, 0), (24, 4, 2**31), (22, 2, 0), (22, 2, 65_535)])
def test_an_impossible_rate_or_number_of_channels_is_broken(at: int, size: int, value: int) -> None:
    data = recording("WAV")
    refused(data[:at] + value.to_bytes(size, "little") + data[at + size :], "unreadable recording|channels at")


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_an_odd_rate_is_what_the_header_says(rate: int) -> None:
    data = recording("WAV", values=NOISE[:1000])
    data = data[:24] + rate.to_bytes(4, "little") + data[28:]
    assert facts(Speech(data)) == SpeechFacts(1000, rate)
    assert length(data) == 1000


def test_255_channels_are_averaged() -> None:
    assert length(recording("WAV", values=np.tile(NOISE[:100, None], 255))) == 100
