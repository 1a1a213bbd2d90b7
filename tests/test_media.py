"""`mm.media`: what the header promises is what decoding gives, and no file however broken does more than raise."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image as PillowImage
from PIL import ImageFile

from mm import media
from mm.media import BrokenMedia, ImageFacts, PointFacts, SpeechFacts, Waveform, decode, facts, measure
from mm.sample import Image, MediaPart, PointCloud, Speech

RATE = 16_000


def picture(width: int = 60, height: int = 40) -> PillowImage.Image:
    """Smooth colours, so that lossy formats stay close; every corner differs."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 0 * x + 40]
    return PillowImage.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: PillowImage.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def recording(values: np.ndarray, format: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, values, rate, format=format, subtype=subtype)
    return stream.getvalue()


def points(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def decoded_picture(data: bytes) -> np.ndarray:
    item = decode(Image(data))
    assert isinstance(item, PillowImage.Image)
    assert item.mode == "RGB"
    assert facts(Image(data)) == measure(item) == item.size
    return np.asarray(item)


def decoded_waveform(data: bytes) -> Waveform:
    item = decode(Speech(data))
    assert isinstance(item, Waveform)
    assert facts(Speech(data)) == measure(item) == (len(item.samples), item.rate)
    return item


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_decodes_to_nearly_the_picture_that_was_saved(format: str) -> None:
    image = picture()
    error = np.abs(decoded_picture(encoded(image, format)).astype(int) - np.asarray(image).astype(int))
    assert error.mean() < 8  # GIF has a palette, JPEG and WebP are lossy


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_comes_upright_and_its_facts_say_so(format: str, orientation: int) -> None:
    upright = picture(60, 40)
    # The stored pixels are those that the tag's transposition turns upright: its inverse, applied to the picture.
    undo = {
        1: None,
        2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
        3: PillowImage.Transpose.ROTATE_180,
        4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
        5: PillowImage.Transpose.TRANSPOSE,
        6: PillowImage.Transpose.ROTATE_90,
        7: PillowImage.Transpose.TRANSVERSE,
        8: PillowImage.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    tag = PillowImage.Exif()
    tag[0x0112] = orientation
    data = encoded(stored, format, exif=tag)
    assert facts(Image(data)) == ImageFacts(60, 40)
    assert np.abs(decoded_picture(data).astype(int) - np.asarray(upright).astype(int)).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_the_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decoded_picture(data).shape == (40, 60, 3)


def test_a_picture_one_pixel_wide_works() -> None:
    assert decoded_picture(encoded(picture(1, 50), "PNG")).shape == (50, 1, 3)
    assert decoded_picture(encoded(picture(50, 1), "JPEG")).shape == (1, 50, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_over_white(mode: str) -> None:
    clear = PillowImage.new(mode, (4, 4), 0)  # black, wholly transparent
    assert (decoded_picture(encoded(clear, "PNG")) == 255).all()


def test_half_transparent_black_over_white_is_grey() -> None:
    half = PillowImage.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(decoded_picture(encoded(half, "PNG")).astype(int) - 127).max() <= 1


def test_a_transparent_palette_entry_and_a_colour_key_are_white() -> None:
    palette = PillowImage.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (decoded_picture(encoded(palette, "PNG", transparency=0)) == 255).all()
    assert (decoded_picture(encoded(palette, "PNG")) == [10, 20, 30]).all()
    keyed = PillowImage.new("RGB", (4, 4), (1, 2, 3))
    assert (decoded_picture(encoded(keyed, "PNG", transparency=(1, 2, 3))) == 255).all()


def test_sixteen_bit_grey_is_scaled_over_its_whole_range() -> None:
    values = np.array([[0, 257, 128 * 257, 254 * 257 + 128, 65_535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        grey = decoded_picture(encoded(PillowImage.fromarray(values), format))
        assert grey[0, :, 0].tolist() == [0, 1, 128, 254, 255]


def test_cmyk_keeps_its_colours() -> None:
    red = PillowImage.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert np.abs(decoded_picture(encoded(red, "JPEG")).astype(int) - [255, 0, 0]).max() < 12


def test_one_bit_and_grey_pictures_become_rgb() -> None:
    assert decoded_picture(encoded(PillowImage.new("1", (3, 2), 1), "PNG")).tolist() == [[[255] * 3] * 3] * 2
    assert decoded_picture(encoded(PillowImage.new("L", (3, 2), 77), "PNG")).tolist() == [[[77] * 3] * 3] * 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [PillowImage.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(decoded_picture(data).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("switch", [False, True])
def test_a_truncated_picture_is_broken_even_where_a_library_allowed_truncation(
    format: str, switch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = PillowImage.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    data = encoded(noise, format)
    for part in (0.3, 0.6, 0.9):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", switch)
        with pytest.raises(BrokenMedia):
            decode(Image(data[: int(len(data) * part)]))


def test_a_progressive_jpeg_cut_short_is_broken() -> None:
    data = encoded(picture(300, 200), "JPEG", progressive=True)
    for cut in range(20, len(data) - 20, len(data) // 50):
        with pytest.raises(BrokenMedia):
            decode(Image(data[:cut]))


@pytest.mark.parametrize("side", [9_000, 30_000, 2_000_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    bomb = png_claiming(side, side)
    assert len(bomb) < 200
    for read in (facts, decode):
        with pytest.raises(BrokenMedia, match="too large"):
            read(Image(bomb))


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenMedia):
        facts(Image(data))


def test_32_bit_pictures_are_refused_rather_than_guessed() -> None:
    with pytest.raises(BrokenMedia, match="32-bit"):
        decode(Image(encoded(PillowImage.new("F", (4, 4), 0.5), "TIFF")))


def test_near_copies_hash_alike_and_other_pictures_do_not() -> None:
    rng = np.random.default_rng(1)
    blobs = PillowImage.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((320, 240))
    other = PillowImage.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((320, 240))
    copy = decode(Image(encoded(blobs.resize((200, 150)), "JPEG", quality=60)))
    assert isinstance(copy, PillowImage.Image)
    assert media.hamming(media.perceptual_hash(blobs), media.perceptual_hash(copy)) <= 4
    assert media.hamming(media.perceptual_hash(blobs), media.perceptual_hash(other)) > 15


def test_the_hash_has_a_bit_for_each_fall_in_brightness() -> None:
    falling = PillowImage.fromarray(np.tile(np.linspace(255, 0, 90).astype(np.uint8), (80, 1)))
    assert media.perceptual_hash(falling) == 2**64 - 1
    assert media.perceptual_hash(falling.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert media.hamming(0b1011, 0b0001) == 2


# ------------------------------------------------------------------------------------------------------------- speech


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.1),
    ],
)
def test_a_recording_has_the_promised_frames_and_the_tone(format: str, subtype: str, tolerance: float) -> None:
    wave = decoded_waveform(recording(TONE, format, subtype))
    assert wave.rate == RATE
    assert abs(len(wave.samples) - RATE) <= (0 if format != "MP3" else 2000)
    middle = wave.samples[4000:12_000]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 220  # 440 Hz in half a second
    assert np.abs(middle).max() == pytest.approx(0.5, abs=max(tolerance, 1e-6))


def test_channels_are_averaged() -> None:
    left, right = np.full(100, 0.5, np.float32), np.full(100, 0.1, np.float32)
    wave = decoded_waveform(recording(np.stack([left, right], axis=1), subtype="FLOAT"))
    assert wave.samples == pytest.approx(np.full(100, 0.3), abs=1e-6)


def test_loud_float_recordings_are_clipped() -> None:
    assert decoded_waveform(recording(np.full(10, 3.0, np.float32), subtype="FLOAT")).samples.tolist() == [1.0] * 10


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_recording_with_a_value_that_is_not_finite_is_broken(value: float) -> None:
    wave = TONE.copy()
    wave[123] = value
    with pytest.raises(BrokenMedia, match="not finite"):
        decode(Speech(recording(wave, subtype="FLOAT")))


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_a_truncated_recording_is_broken(format: str, subtype: str) -> None:
    data = recording(np.tile(TONE, 3) + 0.01 * np.random.default_rng(0).standard_normal(3 * RATE), format, subtype)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(BrokenMedia):
            decode(Speech(data[: int(len(data) * part)]))


def test_a_wav_streamed_without_a_size_is_whole() -> None:
    data = recording(TONE)
    streamed = data[:4] + b"\xff\xff\xff\xff" + data[8:40] + b"\xff\xff\xff\xff" + data[44:]
    assert len(decoded_waveform(streamed).samples) == RATE


def test_a_recording_longer_than_the_limit_is_broken() -> None:
    too_long = np.zeros((media.MAX_SPEECH_SECONDS + 1) * 100, np.int16)
    for read in (facts, decode):
        with pytest.raises(BrokenMedia, match="too long"):
            read(Speech(recording(too_long, "FLAC", "PCM_16", rate=100)))


def test_a_recording_that_claims_a_high_rate_to_pass_the_limit_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_SPEECH_VALUES", 10 * RATE - 1)
    data = bytearray(recording(np.zeros(10 * RATE, np.int16)))
    data[24:28] = (2**31 - 1).to_bytes(4, "little")  # sampling rate: all of it would last 75 microseconds
    with pytest.raises(BrokenMedia, match="too long"):
        facts(Speech(bytes(data)))


@pytest.mark.parametrize("data", [b"", b"RIFF", b"not a recording", recording(np.zeros(0, np.float32))])
def test_what_is_no_recording_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenMedia):
        facts(Speech(data))


# ------------------------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16, ">f4"])
@pytest.mark.parametrize("channels", [3, 6])
def test_points_come_as_float32(dtype: type | str, channels: int) -> None:
    cloud = np.arange(5 * channels).reshape(5, channels).astype(dtype)
    data = points(cloud)
    item = decode(PointCloud(data))
    assert isinstance(item, np.ndarray)
    assert facts(PointCloud(data)) == measure(item) == PointFacts(5, channels)
    assert item.dtype == np.float32
    assert np.array_equal(item, cloud.astype(np.float32))


def test_points_in_fortran_order_are_the_same_points() -> None:
    cloud = np.asfortranarray(np.arange(12.0).reshape(4, 3))
    assert np.array_equal(np.asarray(decode(PointCloud(points(cloud)))), cloud)


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (np.zeros((4, 5)), "shape"),
        (np.zeros((4, 3, 1)), "shape"),
        (np.zeros((0, 3)), "shape"),
        (np.zeros((4, 3), complex), "expected numbers"),
        (np.zeros((media.MAX_POINTS + 1, 3), np.uint8), "too large"),
        (np.full((4, 3), np.nan), "not finite"),
        (np.full((4, 3), 1e300), "not finite"),
    ],
)
def test_a_cloud_that_cannot_be_used_is_broken(cloud: np.ndarray, reason: str) -> None:
    with pytest.raises(BrokenMedia, match=reason):
        decode(PointCloud(points(cloud)))


def test_a_pickled_array_is_refused_and_never_loaded(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("touched").touch, ())

    stream = io.BytesIO()
    np.save(stream, np.full((4, 3), Trap(), dtype=object), allow_pickle=True)
    for read in (facts, decode):
        with pytest.raises(BrokenMedia, match="expected numbers"):
            read(PointCloud(stream.getvalue()))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("header", ["(" * 9000, "-" * 9000 + "1", "[1," * 3000, "{'descr': 1}", "\0"])
def test_a_hostile_header_is_broken(header: str) -> None:
    body = header.encode() + b"\n"
    with pytest.raises(BrokenMedia):
        facts(PointCloud(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body))


def test_a_truncated_cloud_is_broken() -> None:
    with pytest.raises(BrokenMedia, match="truncated"):
        facts(PointCloud(points(np.zeros((100, 3)))[:-1]))


# --------------------------------------------------------------------------------------------------------------- fuzz


def mangled(data: bytes, source: random.Random) -> bytes:
    """The file with a few bytes changed, mostly in its header, and often cut."""
    changed = bytearray(data[: source.randrange(len(data))] if source.random() < 0.4 else data)
    for _ in range(source.randrange(1, 6)):
        if changed:
            changed[source.randrange(min(len(changed), source.choice([40, 200, 10**6])))] = source.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata
@pytest.mark.parametrize(
    "part",
    [
        *(pytest.param(Image(encoded(picture(), format)), id=format) for format in FORMATS),
        pytest.param(Speech(recording(TONE[:4000])), id="WAV"),
        pytest.param(Speech(recording(TONE[:4000], "FLAC")), id="FLAC"),
        pytest.param(Speech(recording(TONE[:4000], "OGG")), id="OGG"),
        pytest.param(PointCloud(points(np.ones((20, 6)))), id="NPY"),
    ],
)
def test_a_damaged_file_is_broken_or_as_promised_and_nothing_else(part: MediaPart) -> None:
    source = random.Random(5)
    outcomes = {"broken": 0, "whole": 0}
    for _ in range(150):
        damaged = type(part)(mangled(part.data, source))
        try:
            promised, item = facts(damaged), decode(damaged)
        except BrokenMedia:
            outcomes["broken"] += 1
            continue
        outcomes["whole"] += 1
        if isinstance(item, Waveform):
            assert promised == SpeechFacts(len(item.samples), item.rate)
        else:
            assert promised == (item.shape if isinstance(item, np.ndarray) else item.size)
    assert outcomes["broken"] > 20
