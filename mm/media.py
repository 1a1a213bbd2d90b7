"""Header facts and decoding of media files, with limits: what comes in is untrusted.

`facts` answers from the header what `decode` will give, so that a plan can be made without decoding. The two agree by
construction (EXIF rotation is read before the pixels, by both) or `decode` raises `BrokenMedia`; they never differ
quietly. Formats are an explicit list: Pillow would also open PostScript, which runs a program.
"""

from __future__ import annotations

import io
import struct
import tokenize
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image as PillowImage
from PIL import ImageFile

from mm.containers import UNKNOWN, whole
from mm.picture_limits import check_blocks, check_picture
from mm.sample import BrokenMedia, Image, MediaPart, Modality, Speech

MAX_SPEECH_SECONDS = 1800
"""Longest recording, in seconds."""

MAX_SPEECH_VALUES = MAX_SPEECH_SECONDS * 48_000
"""Most values of a recording over all channels, whatever sampling rate its header claims: 330 MiB as float32."""

MAX_POINTS = 4 * 1024**2
"""Most points of a cloud."""

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # one a tag: thousands for a damaged picture

_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SPEECH_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
_SHOWN = 200  # characters of a header in a message
_STRIP = 1024**2  # pixels of a picture that are converted at a time

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
    """What the decoded item will be, from the header alone. Every value is in [1, 2³¹).

    Decoded once for its length is a recording whose header does not know it, see `mm.containers`.

    Raises:
        BrokenMedia: the header cannot be read, or promises more than the limits of this module.
    """
    found = _FACTS[part.modality](part.data)
    if not all(type(value) is int and 0 < value < 2**31 for value in found):
        raise BrokenMedia(f"{part.modality.label} of {_shown(found)}; expected whole numbers in [1, 2^31)")
    return found


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
    check_blocks(data)
    try:
        picture = PillowImage.open(io.BytesIO(data), formats=_PICTURE_FORMATS)
    except PillowImage.DecompressionBombError as error:
        raise BrokenMedia(f"picture too large: {error}") from error
    except _DAMAGED as error:
        raise BrokenMedia(f"unreadable picture: {type(error).__name__}: {error}") from error
    check_picture(picture, data)
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
    del picture  # with its decoder
    rgb.info = {}  # comments and colour profiles would go into every file that is made of the picture
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _to_rgb(picture: PillowImage.Image) -> PillowImage.Image:
    """The picture in RGB, converted strip by strip: copies of all of it in between would take several times as much."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    rgb = PillowImage.new("RGB", picture.size)
    rows = max(1, _STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def _strip_to_rgb(picture: PillowImage.Image) -> PillowImage.Image:
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


class _Recording(soundfile.SoundFile):
    """An open recording, read from front to back.

    exact: whether its header states the number of frames
    """

    exact: bool

    def seekable(self) -> bool:
        """False: soundfile would seek after every read, which fails at the end of a FLAC of unknown length."""
        return False


def _open_speech(data: bytes) -> _Recording:
    """An open recording within the limits, whole as far as its container says."""
    if not data:
        raise BrokenMedia("empty recording file")
    container = whole(data)
    try:
        file = _Recording(io.BytesIO(container.data))
    except (soundfile.SoundFileError, TypeError) as error:
        raise BrokenMedia(f"unreadable recording: {error}") from error
    if file.format not in _SPEECH_FORMATS:
        raise BrokenMedia(f"recording in format {file.format}, can read {', '.join(_SPEECH_FORMATS)}")
    if file.samplerate <= 0 or file.channels <= 0:
        raise BrokenMedia(f"recording with {file.channels} channels at {file.samplerate} Hz")
    file.exact = container.exact and file.format != "MP3" and file.frames < UNKNOWN
    if file.exact:
        _limit_speech(file, file.frames)
    return file


def _limit_speech(file: _Recording, frames: int) -> None:
    if frames <= 0:
        raise BrokenMedia("recording without samples")
    if frames > MAX_SPEECH_SECONDS * file.samplerate or frames * file.channels > MAX_SPEECH_VALUES:
        raise BrokenMedia(
            f"recording too long: {frames} frames, {file.channels} channels at {file.samplerate} Hz; the limits are "
            f"{MAX_SPEECH_SECONDS} s and {MAX_SPEECH_VALUES} values"
        )


def _read_speech(file: _Recording) -> np.ndarray:
    """(frames, channels) float32. Where the header is exact, the number of frames is the promised one."""
    try:
        if file.exact:
            values = file.read(file.frames, dtype="float32", always_2d=True)
        else:
            values = np.concatenate(_blocks(file))
    except (soundfile.SoundFileError, MemoryError) as error:
        raise BrokenMedia(f"undecodable recording: {error}") from error
    _limit_speech(file, len(values))
    if file.exact and len(values) != file.frames:
        raise BrokenMedia(f"truncated recording: {len(values)} of {file.frames} frames")
    return values


def _blocks(file: _Recording) -> list[np.ndarray]:
    """All there is, block by block, since the header does not state the length; ends beyond the limit."""
    blocks: list[np.ndarray] = [np.empty((0, file.channels), np.float32)]
    frames, rows = 0, max(1, (1 << 20) // file.channels)
    while len(block := file.read(rows, dtype="float32", always_2d=True)):
        blocks.append(block)
        frames += len(block)
        _limit_speech(file, frames)
    return blocks


def _speech_facts(data: bytes) -> SpeechFacts:
    with _open_speech(data) as file:
        return SpeechFacts(file.frames if file.exact else len(_read_speech(file)), file.samplerate)


def _decode_speech(data: bytes) -> Waveform:
    with _open_speech(data) as file:
        values = _read_speech(file)
        samples = values[:, 0] if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32)
        if not np.isfinite(samples).all():
            raise BrokenMedia("recording with values that are not finite")
        return Waveform(np.clip(samples, -1.0, 1.0, out=samples), file.samplerate)


def _point_facts(data: bytes) -> PointFacts:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except _DAMAGED_HEADER as error:
        raise BrokenMedia(f"unreadable point cloud: {_shown(error)}") from error
    if dtype.kind not in "fiu":
        raise BrokenMedia(f"point cloud of {_shown(dtype)}, expected numbers")
    if any(type(size) is not int for size in shape) or len(shape) != 2 or shape[1] not in (3, 6) or shape[0] < 1:
        raise BrokenMedia(f"point cloud of shape {_shown(shape)}, expected (n, 3) or (n, 6)")
    if shape[0] > MAX_POINTS:
        raise BrokenMedia(f"point cloud too large: {_shown(shape[0])} points, the limit is {MAX_POINTS}")
    promised, given = shape[0] * shape[1] * dtype.itemsize, len(data) - stream.tell()
    if given < promised:
        raise BrokenMedia(f"truncated point cloud: {given} of {promised} bytes")
    return PointFacts(*shape)


def _shown(value: object) -> str:
    """The start of what a header says, for a message. Python refuses to write out a number of thousands of digits."""
    try:
        text = str(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


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
