"""Header facts and decoding of media files, with limits: what comes in is untrusted.

`facts` answers from the header what `decode` will give, so that a plan can be made without decoding. The two agree by
construction (EXIF rotation is read before the pixels, by both) or `decode` raises `BrokenMedia`; they never differ
quietly. Formats are an explicit list: Pillow would also open PostScript, which runs a program.
"""

from __future__ import annotations

import io
import struct
import tokenize
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image as PillowImage
from PIL import ImageFile

from mm.sample import BrokenSample, Image, MediaPart, Modality, Speech

MAX_PIXELS = 64 * 1024**2
"""Most pixels of a picture: 192 MiB once it is decoded. A PNG of a few kilobytes may claim a thousand times that."""

MAX_SPEECH_SECONDS = 1800
"""Longest recording, in seconds."""

MAX_SPEECH_VALUES = MAX_SPEECH_SECONDS * 48_000
"""Most values of a recording over all channels, whatever sampling rate its header claims: 330 MiB as float32."""

MAX_POINTS = 4 * 1024**2
"""Most points of a cloud."""

_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SPEECH_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
_UNKNOWN_RIFF_SIZES = (0, 0xFFFF_FFFF)  # what programs write that stream a WAV into a pipe

_UPRIGHT = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)

_DAMAGED = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)
"""What Pillow's parsers raise on damaged files. They promise no narrower type; found by fuzzing."""

_DAMAGED_HEADER = (ValueError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError, tokenize.TokenError)
"""What NumPy raises on damaged ``.npy`` headers, which are Python literals."""


class BrokenMedia(BrokenSample):
    """A file that cannot be used; the message says why."""


class ImageFacts(NamedTuple):
    """Size in pixels after EXIF rotation."""

    width: int
    height: int


class SpeechFacts(NamedTuple):
    """Length in samples of one channel, and sampling rate in Hz."""

    frames: int
    rate: int


class PointFacts(NamedTuple):
    """Number of points and of values per point (3 coordinates, or 6 with colours)."""

    points: int
    channels: int


Facts = ImageFacts | SpeechFacts | PointFacts


class Waveform(NamedTuple):
    """samples: (frames,) float32 in [-1, 1], one channel; rate in Hz."""

    samples: np.ndarray
    rate: int


Item = PillowImage.Image | Waveform | np.ndarray
"""What `decode` gives: an RGB picture, a mono waveform, or an (n, 3 | 6) float32 array."""


def facts(part: MediaPart) -> Facts:
    """What the decoded item will be, from the header alone. MP3 is decoded once: its headers only estimate.

    Raises:
        BrokenMedia: the header cannot be read, or promises more than the limits of this module.
    """
    return _FACTS[part.modality](part.data)


def decode(part: MediaPart) -> Item:
    """The item that `facts` described.

    Pictures become RGB: the first frame of an animation, upright by their EXIF tag, transparency over white, 16-bit
    grey scaled to 8. Recordings become the mean of their channels at the rate of the file.

    Raises:
        BrokenMedia: the file is damaged, truncated, holds values that are not finite, or exceeds a limit.
    """
    return _DECODE[part.modality](part.data)


def measure(item: Item) -> Facts:
    """Facts of a decoded item: those that `facts` gave of its file, without opening the file again."""
    if isinstance(item, PillowImage.Image):
        return ImageFacts(*item.size)
    if isinstance(item, Waveform):
        return SpeechFacts(len(item.samples), item.rate)
    return PointFacts(*item.shape)


def extension(part: MediaPart) -> str:
    """File name extension for the part's bytes, without dot, from their header."""
    if isinstance(part, Image):
        with _open_picture(part.data)[0] as picture:
            return (picture.format or "bin").lower()
    if isinstance(part, Speech):
        with _open_speech(part.data) as file:
            return file.format.lower()
    return "npy"


def perceptual_hash(picture: PillowImage.Image) -> int:
    """64-bit difference hash: bit i says whether a cell of an 8 × 8 grid is brighter than its right neighbour.

    Near-copies (rescaled, recompressed) differ in a few bits, see `hamming`. Pictures without contrast all give 0.
    """
    grey = picture.convert("L").resize((9, 8), PillowImage.Resampling.BOX, reducing_gap=2.0)
    cells = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


def hamming(first: int, second: int) -> int:
    """Number of bits in which two perceptual hashes differ: 0 to 64."""
    return (first ^ second).bit_count()


def _open_picture(data: bytes) -> tuple[PillowImage.Image, int]:
    """A picture whose pixels are still encoded, and its EXIF orientation (1 to 8) as known before decoding."""
    if not data:
        raise BrokenMedia("empty picture file")
    try:
        picture = PillowImage.open(io.BytesIO(data), formats=_PICTURE_FORMATS)
    except PillowImage.DecompressionBombError as error:
        raise BrokenMedia(f"picture too large: {error}") from error
    except _DAMAGED as error:
        raise BrokenMedia(f"unreadable picture: {type(error).__name__}: {error}") from error
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BrokenMedia(f"picture too large: {width} x {height} pixels, the limit is {MAX_PIXELS}")
    return picture, _orientation(picture)


def _orientation(picture: PillowImage.Image) -> int:
    if picture.format == "TIFF":
        return 1  # Pillow turns TIFF pictures upright itself, and gives their upright size
    try:
        # The method of the base class: the one of PNG decodes the whole picture in search of late metadata.
        orientation = PillowImage.Image.getexif(picture).get(0x0112, 1)
    except _DAMAGED:
        return 1  # damaged metadata does not spoil the picture
    return orientation if orientation in _UPRIGHT else 1


def _image_facts(data: bytes) -> ImageFacts:
    picture, orientation = _open_picture(data)
    width, height = picture.size
    return ImageFacts(height, width) if orientation in _SWAPS_SIDES else ImageFacts(width, height)


def _decode_image(data: bytes) -> PillowImage.Image:
    picture, orientation = _open_picture(data)
    # Libraries set this switch for the whole process; with it, the missing part of a picture is silently grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        picture.load()
        rgb = _to_rgb(picture)
    except _DAMAGED as error:
        raise BrokenMedia(f"undecodable picture: {type(error).__name__}: {error}") from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _to_rgb(picture: PillowImage.Image) -> PillowImage.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16"):
        grey = np.array(picture).astype(np.uint32)
        return PillowImage.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise BrokenMedia(f"picture with 32-bit values (mode {picture.mode}) has no known white")
    if picture.has_transparency_data:
        canvas = PillowImage.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture.convert("RGBA"))
        return canvas.convert("RGB")
    return picture.convert("RGB")


def _open_speech(data: bytes) -> soundfile.SoundFile:
    """An open recording within the limits, whole as far as its container says."""
    if not data:
        raise BrokenMedia("empty recording file")
    _check_whole(data)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.SoundFileError, TypeError) as error:
        raise BrokenMedia(f"unreadable recording: {error}") from error
    if file.format not in _SPEECH_FORMATS:
        raise BrokenMedia(f"recording in format {file.format}, can read {', '.join(_SPEECH_FORMATS)}")
    if file.samplerate <= 0 or file.channels <= 0:
        raise BrokenMedia(f"recording with {file.channels} channels at {file.samplerate} Hz")
    if file.format != "MP3":
        _limit_speech(file, file.frames)
    return file


def _check_whole(data: bytes) -> None:
    """Refuses truncated WAV and OGG files: libsndfile shortens the recording to what is there, without a sign.

    Half a recording beside a whole transcript is a wrong sample. FLAC tells by its number of frames; MP3 cannot tell.
    """
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little") + 8
        if size > len(data) and size - 8 not in _UNKNOWN_RIFF_SIZES:
            raise BrokenMedia(f"truncated recording: {len(data)} of {size} bytes")
    elif data[:4] == b"OggS":
        # RFC 3533, section 6: byte 5 of a page holds the end-of-stream flag, byte 26 the number of segment lengths.
        page = data[data.rfind(b"OggS") :]
        ends = len(page) > 26 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
        if not ends:
            raise BrokenMedia("truncated recording: the OGG stream has no end")


def _limit_speech(file: soundfile.SoundFile, frames: int) -> None:
    if frames <= 0:
        raise BrokenMedia("recording without samples")
    if frames > MAX_SPEECH_SECONDS * file.samplerate or frames * file.channels > MAX_SPEECH_VALUES:
        raise BrokenMedia(
            f"recording too long: {frames} frames, {file.channels} channels at {file.samplerate} Hz; the limits are "
            f"{MAX_SPEECH_SECONDS} s and {MAX_SPEECH_VALUES} values"
        )


def _read_speech(file: soundfile.SoundFile) -> np.ndarray:
    """(frames, channels) float32. Where the header is exact, the number of frames is the promised one."""
    try:
        if file.format != "MP3":
            values = file.read(dtype="float32", always_2d=True)
        else:
            values = np.concatenate(_mp3_blocks(file))
    except (soundfile.SoundFileError, MemoryError) as error:
        raise BrokenMedia(f"undecodable recording: {error}") from error
    _limit_speech(file, len(values))
    if file.format != "MP3" and len(values) != file.frames:
        raise BrokenMedia(f"truncated recording: {len(values)} of {file.frames} frames")
    return values


def _mp3_blocks(file: soundfile.SoundFile) -> list[np.ndarray]:
    """All there is, block by block, since the length in the header is an estimate; ends beyond the limit."""
    blocks: list[np.ndarray] = [np.empty((0, file.channels), np.float32)]
    frames = 0
    while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
        blocks.append(block)
        frames += len(block)
        _limit_speech(file, frames)
    return blocks


def _speech_facts(data: bytes) -> SpeechFacts:
    with _open_speech(data) as file:
        frames = len(_read_speech(file)) if file.format == "MP3" else file.frames
        return SpeechFacts(frames, file.samplerate)


def _decode_speech(data: bytes) -> Waveform:
    with _open_speech(data) as file:
        values = _read_speech(file)
        samples = values[:, 0] if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32)
        if not np.isfinite(samples).all():
            raise BrokenMedia("recording with values that are not finite")
        return Waveform(np.clip(samples, -1.0, 1.0), file.samplerate)


def _point_facts(data: bytes) -> PointFacts:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except _DAMAGED_HEADER as error:
        raise BrokenMedia(f"unreadable point cloud: {error}") from error
    if dtype.kind not in "fiu":
        raise BrokenMedia(f"point cloud of {dtype}, expected numbers")
    if len(shape) != 2 or shape[1] not in (3, 6) or shape[0] < 1:
        raise BrokenMedia(f"point cloud of shape {shape}, expected (n, 3) or (n, 6)")
    if shape[0] > MAX_POINTS:
        raise BrokenMedia(f"point cloud too large: {shape[0]} points, the limit is {MAX_POINTS}")
    promised, given = shape[0] * shape[1] * dtype.itemsize, len(data) - stream.tell()
    if given < promised:
        raise BrokenMedia(f"truncated point cloud: {given} of {promised} bytes")
    return PointFacts(*shape)


def _decode_points(data: bytes) -> np.ndarray:
    _point_facts(data)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is caught below
        points = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
    if not np.isfinite(points).all():
        raise BrokenMedia("point cloud with values that are not finite")
    return points


_FACTS: dict[Modality, Callable[[bytes], Facts]] = {
    Modality.IMAGE: _image_facts,
    Modality.SPEECH: _speech_facts,
    Modality.POINT: _point_facts,
}
_DECODE: dict[Modality, Callable[[bytes], Any]] = {
    Modality.IMAGE: _decode_image,
    Modality.SPEECH: _decode_speech,
    Modality.POINT: _decode_points,
}
