"""Small pictures of media as data URLs: a thumbnail, a waveform, a point cloud from the side; sheets of pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from mm import media
from mm.media import Waveform
from mm.sample import Image, MediaPart, Modality

THUMBNAIL = 128  # pixels of the longer side
WAVE = (176, 56)  # pixels
CLOUD = 96  # pixels of a side
GAP = 4  # pixels between the pictures of a sheet
MOST_POINTS = 4096
SPARSE = 1000  # points; up to so many are drawn larger
INK = {Modality.SPEECH: (22, 122, 112), Modality.POINT: (112, 72, 178)}


def picture_of(part: MediaPart) -> str:
    """A data URL of a small picture of an item.

    Raises:
        BrokenMedia: the item cannot be decoded.
    """
    return _PICTURES[part.modality](media.decode(part))


def thumbnail(data: bytes, size: int = THUMBNAIL) -> str:
    """A JPEG data URL of an encoded picture, no side longer than `size` pixels.

    Raises:
        BrokenMedia: the picture cannot be decoded.
    """
    picture = media.decode(Image(data))
    assert isinstance(picture, PillowImage.Image)
    return _thumbnail(picture, size)


def exact(picture: PillowImage.Image, size: int) -> str:
    """A PNG data URL of a picture, no side longer than `size` pixels; a small one keeps every pixel."""
    small = picture.copy()
    small.thumbnail((size, size), PillowImage.Resampling.LANCZOS)
    return _data_url(small, "PNG")


def contact_sheet(pictures: Sequence[PillowImage.Image]) -> PillowImage.Image:
    """Pictures side by side on white, row by row, in as many columns as rows if possible."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = (max(picture.size[axis] for picture in pictures) + GAP for axis in (0, 1))
    rows = math.ceil(len(pictures) / columns)
    sheet = PillowImage.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width + GAP, number // columns * height + GAP))
    return sheet


def save_pictures(pictures: Sequence[np.ndarray], folder: Path) -> None:
    """Write (rows, columns, 3) uint8 pictures as ``000.png``, …, and all of them as ``sheet.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [PillowImage.fromarray(pixels) for pixels in pictures]
    for number, image in enumerate(images):
        image.save(folder / f"{number:03d}.png")
    contact_sheet(images).save(folder / "sheet.png")


def _thumbnail(picture: PillowImage.Image, size: int = THUMBNAIL) -> str:
    small = picture.copy()
    small.thumbnail((size, size), PillowImage.Resampling.LANCZOS)
    return _data_url(small, "JPEG", quality=82)


def _waveform(wave: Waveform) -> str:
    """The envelope: least and greatest value in the time of every pixel column, scaled to the loudest."""
    width, height = WAVE
    picture = PillowImage.new("RGB", WAVE, "white")
    draw = ImageDraw.Draw(picture)
    middle = (height - 1) / 2
    draw.line((0, middle, width, middle), fill=(205, 224, 221))
    loudest = max(float(np.abs(wave.samples).max(initial=0.0)), 1e-6)
    for column, part in enumerate(np.array_split(wave.samples, width)):
        if len(part):
            high, low = float(part.max()) / loudest, float(part.min()) / loudest
            draw.line((column, middle * (1 - high), column, middle * (1 - low)), fill=INK[Modality.SPEECH])
    return _data_url(picture, "PNG")


def _cloud(points: np.ndarray) -> str:
    """An oblique projection, near points over far ones, in their own colours or darker the nearer."""
    points = points[:: max(1, len(points) // MOST_POINTS)]
    centred = points[:, :3] - points[:, :3].mean(axis=0)
    x, y, z = (centred / max(float(np.abs(centred).max()), 1e-9)).T
    across, up, depth = 0.87 * x - 0.5 * y, 0.9 * z + 0.25 * x + 0.43 * y, -0.5 * x - 0.87 * y
    reach = max(float(np.abs(across).max()), float(np.abs(up).max()), 1e-9)
    columns = (CLOUD / 2 + 0.46 * CLOUD * across / reach).astype(int)
    rows = (CLOUD / 2 - 0.46 * CLOUD * up / reach).astype(int)
    canvas = np.full((CLOUD, CLOUD, 3), 255, np.uint8)
    order = np.argsort(depth, kind="stable")
    colours = _colours(points, depth)[order]
    dot = range(1 if len(points) > SPARSE else 3)  # pixels of its side
    for down in dot:
        for right in dot:
            canvas[rows[order] + down, columns[order] + right] = colours
    return _data_url(PillowImage.fromarray(canvas), "PNG")


def _colours(points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(n, 3) uint8 colours of (n, 3 | 6) points; a cloud's own colours are in [0, 1] or [0, 255]."""
    if points.shape[1] == 6:
        scale = 255.0 if points[:, 3:].max() <= 1.0 else 1.0
        return np.clip(points[:, 3:] * scale, 0, 255).astype(np.uint8)
    nearness = np.clip(0.35 + 0.65 * (depth - depth.min()) / max(float(np.ptp(depth)), 1e-9), 0, 1)[:, None]
    return (255 - nearness * (255 - np.array(INK[Modality.POINT]))).astype(np.uint8)


def _data_url(picture: PillowImage.Image, format: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format, optimize=True, **options)
    return data_url(buffer.getvalue(), format)


def data_url(data: bytes, format: str) -> str:
    """An encoded picture as an address that needs no file."""
    return f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"


_PICTURES: dict[Modality, Callable[..., str]] = {
    Modality.IMAGE: _thumbnail,
    Modality.SPEECH: _waveform,
    Modality.POINT: _cloud,
}
