"""What flows through the suite: a sample is an ordered list of parts, whatever its task.

A caption pair is ``[Image, Text]``, an interleaved page ``[Text, Image, Text, …]``, a chat the same with roles.
Media parts hold the encoded file (undecoded) until the last moment; `mm.media` reads their headers and decodes them.
Where a modality is discrete, training reads `Codes` in their place.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal

Role = Literal["system", "user", "assistant"]


LONGEST = 500
"""Characters of a key or a reason that are kept: both may quote untrusted data of any length."""


class BrokenSample(ValueError):
    """A sample that cannot be used; the message says why. Becomes a counted skip or padding, never a crash.

    The message is at most `LONGEST` characters long and can be encoded as UTF-8, whatever it quotes.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(encodable(reason))


def encodable(text: str) -> str:
    """The text with lone surrogates escaped, cut to `LONGEST` characters."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"


def encodable_key(key: str) -> str:
    """A key as `encodable` gives it; one that is cut ends in a digest, so that different keys stay different."""
    short = encodable(key)
    if not short.endswith("…") or len(short) < LONGEST:
        return short
    digest = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
    return f"{short[: LONGEST - len(digest) - 1]}…{digest}"


class BrokenMedia(BrokenSample):
    """A file that cannot be used; the message says why."""


class Modality(IntEnum):
    """The modality of a token of the stream, as stored in `Batch.modality`."""

    TEXT = 0
    IMAGE = 1
    SPEECH = 2
    POINT = 3

    @property
    def label(self) -> str:
        """The name used in recipes, cards and logs: ``text``, ``image``, ``speech``, ``point``."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Text:
    """Words. `loss` says whether they are to be predicted; `role` is set in chats only."""

    text: str
    loss: bool = True
    role: Role | None = None
    modality: ClassVar[Modality] = Modality.TEXT


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture: JPEG, PNG, WebP, GIF, BMP or TIFF bytes."""

    data: bytes
    role: Role | None = None
    modality: ClassVar[Modality] = Modality.IMAGE


@dataclass(frozen=True, slots=True)
class Speech:
    """An encoded recording: WAV, FLAC, OGG or MP3 bytes."""

    data: bytes
    role: Role | None = None
    modality: ClassVar[Modality] = Modality.SPEECH


@dataclass(frozen=True, slots=True)
class PointCloud:
    """A ``.npy`` file with an (n, 3) array of coordinates or (n, 6) of coordinates and colours."""

    data: bytes
    role: Role | None = None
    modality: ClassVar[Modality] = Modality.POINT


@dataclass(frozen=True, slots=True)
class Codes:
    """An item that a tokenizer has turned into codes: `ids` in [0, K), without the offset of the joint vocabulary."""

    modality: Modality
    ids: tuple[int, ...]
    role: Role | None = None


MediaPart = Image | Speech | PointCloud
Part = Text | MediaPart | Codes
MEDIA_PARTS: dict[Modality, type[MediaPart]] = {
    Modality.IMAGE: Image,
    Modality.SPEECH: Speech,
    Modality.POINT: PointCloud,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or evaluation example.

    `source` is the name of its card and `key` a label for people. Neither identifies it: WebDataset keys repeat across
    shards. Identity is (source, shard, row).
    """

    source: str
    key: str
    parts: tuple[Part, ...]

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """The parts that are files, in order."""
        return tuple(part for part in self.parts if isinstance(part, MediaPart))

    @property
    def is_chat(self) -> bool:
        return any(part.role is not None for part in self.parts)
