"""Limits on what a small picture file may cost to decode, beyond its number of pixels."""

from __future__ import annotations

from PIL import Image as PillowImage
from PIL import TiffImagePlugin

from mm.sample import BrokenMedia

MAX_PIXELS = 64 * 1024**2
"""Most pixels of a picture: 256 MiB once it is decoded. A PNG of a few kilobytes may claim a thousand times that."""

MAX_SIDE = 1024**2
"""Most pixels of a side. Resizing computes up to 48 bytes of filter for each of them."""

_FEWER_PIXELS = {
    "WEBP": MAX_PIXELS // 2,  # its decoder holds the picture three times
    "run-length": MAX_PIXELS // 4,  # Pillow decodes them in Python, byte by byte
}

MAX_SCANNED = 2**31
"""Most pixels that the scans of a JPEG may pass over, all together: 3 seconds. A progressive one has about ten scans;
one of a few kilobytes can have thousands, each of which decodes the whole picture again."""

MAX_EXIF_BLOCKS = 1024
"""Most blocks of EXIF data in a JPEG: Pillow joins them one by one, which takes 20 seconds for half a million."""

MAX_TILE = 16 * 1024**2
"""Most pixels of a tile of a TIFF, which is decoded whole however small the picture is."""


def check_blocks(data: bytes) -> None:
    """Refuse a picture whose header alone would take too much time, before it is opened.

    Raises:
        BrokenMedia: it would.
    """
    blocks = data.count(b"Exif\0\0") if data.startswith(b"\xff\xd8") else 0
    if blocks > MAX_EXIF_BLOCKS:
        raise BrokenMedia(f"JPEG of {blocks} blocks of EXIF data, the limit is {MAX_EXIF_BLOCKS}")


def check_picture(picture: PillowImage.Image, data: bytes) -> None:
    """Refuse a picture, known by its header, that would take too much memory or time.

    Raises:
        BrokenMedia: it would.
    """
    width, height = picture.size
    limit = _FEWER_PIXELS.get(_kind(picture), MAX_PIXELS)
    if not 0 < width * height <= limit or max(width, height) > MAX_SIDE:
        raise BrokenMedia(
            f"picture too large: {width} x {height} pixels, the limit is {limit}, and {MAX_SIDE} for a side"
        )
    if picture.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")  # a byte 0xFF of a scan's own data is followed by 0
        if scans * width * height > MAX_SCANNED:
            raise BrokenMedia(f"JPEG of {scans} scans over {width} x {height} pixels, far more than an encoder writes")
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        across, down = (picture.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if not (isinstance(across, int) and isinstance(down, int)) or across * down > MAX_TILE:
            raise BrokenMedia(f"TIFF with tiles of {across} x {down} pixels, the limit is {MAX_TILE}")


def _kind(picture: PillowImage.Image) -> str:
    compressed = picture.format == "BMP" and picture.info.get("compression") in (1, 2)
    return "run-length" if compressed else str(picture.format)
