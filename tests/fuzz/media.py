"""Mutated pictures, recordings and point clouds, and what reading one has to keep."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image as PillowImage

from mm import media
from mm.sample import MEDIA_PARTS, BrokenSample, MediaPart, Modality
from tests.fuzz import mutate
from tests.shard_files import cloud


def _pictures(draw: random.Random) -> bytes:
    format = draw.choice(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    mode = draw.choice(("RGB", "L", "P", "RGBA", "1", "I;16") if format in ("PNG", "TIFF") else ("RGB", "L"))
    sides = (24, 9)
    picture = PillowImage.frombytes("RGB", sides, draw.randbytes(24 * 9 * 3))
    picture = PillowImage.new("I;16", sides, 700) if mode == "I;16" else picture.convert(mode)
    stream = io.BytesIO()
    more: dict[str, Any] = {}
    if format in ("GIF", "WEBP", "TIFF", "PNG") and draw.random() < 0.3:
        more = {"save_all": True, "append_images": [picture] * 3}
    if format in ("JPEG", "PNG", "WEBP") and draw.random() < 0.4:
        exif = PillowImage.Exif()
        exif[0x0112] = draw.choice((0, 3, 6, 8, 9, 65535))
        more["exif"] = exif
    picture.save(stream, format, **more)
    return stream.getvalue()


def _recordings(draw: random.Random) -> bytes:
    format, subtype = draw.choice(
        (
            ("WAV", "PCM_16"),
            ("WAV", "FLOAT"),
            ("WAVEX", "PCM_16"),
            ("RF64", "PCM_16"),
            ("FLAC", "PCM_16"),
            ("OGG", "VORBIS"),
            ("MP3", "MPEG_LAYER_III"),
        )
    )
    stream = io.BytesIO()
    samples = np.sin(np.arange(draw.choice((1, 800, 5000))))[:, None].repeat(draw.choice((1, 2)), 1) * 0.3
    soundfile.write(stream, samples, draw.choice((8000, 16_000, 44_100)), format=format, subtype=subtype)
    return stream.getvalue()


def _clouds(draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return cloud(draw.choice((1, 7)), draw.choice((3, 6)))
    header = {
        "descr": draw.choice(("<f4", ">f8", "<f2", "|O", "<c8", "<i8", "|b1", "<U3", "[('a', '<f4')]", "<M8[s]", 5)),
        "fortran_order": draw.choice((False, True, 1, None)),
        "shape": draw.choice(((7, 3), (2**40, 3), (-1, 3), (True, 3), (3,), (), (2**63, 6), (7, 3.0), "7", [7, 3])),
    }
    text = (repr(header) if draw.random() < 0.8 else "[" * draw.choice((50, 5000))).encode() + b"\n"
    version = draw.choice((1, 2, 3))
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(7 * 3 * 4)


_MEDIA = {Modality.IMAGE: _pictures, Modality.SPEECH: _recordings, Modality.POINT: _clouds}


def write_media(draw: random.Random, folder: Path) -> None:
    modality = draw.choice((Modality.IMAGE, Modality.IMAGE, Modality.SPEECH, Modality.SPEECH, Modality.POINT))
    data = _MEDIA[modality](draw)
    data = mutate.bytes_of(draw, data, draw.choice((1, 1, 2, 6)), ends=draw.choice((48, 48, 300)))
    (folder / f"a.{modality.label}").write_bytes(data)


def use_media(draw: random.Random, folder: Path) -> None:
    """Facts and decoding agree, or both are refused as broken."""
    (path,) = folder.glob("a.*")
    part: MediaPart = MEDIA_PARTS[{one.label: one for one in Modality}[path.suffix[1:]]](path.read_bytes())
    try:
        facts = media.facts(part)
    except BrokenSample:
        facts = None
    try:
        item = media.decode(part)
    except BrokenSample:
        return
    assert facts is not None, "decoded, although its header was refused"
    assert all(0 <= fact < 2**31 for fact in facts), f"facts {facts} do not fit the index"
    assert tuple(media.measure(item)) == tuple(facts), f"decodes to {media.measure(item)}, promised were {facts}"
    if isinstance(item, PillowImage.Image):
        media.perceptual_hash(item)
