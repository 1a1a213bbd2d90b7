"""Header facts and decoding of media files, with limits: what comes in is untrusted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image as PillowImage

from mm.sample import MediaPart


class BrokenMedia(ValueError):
    """A file that cannot be used; the message says why. Becomes a counted skip or padding, never a crash."""


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
    raise NotImplementedError


def decode(part: MediaPart) -> Item:
    raise NotImplementedError
