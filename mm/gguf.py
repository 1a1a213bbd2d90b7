"""GGUF files of llama.cpp: key-value header and quantised tensors (the GGUF specification of ggml, version 2 and 3).

magic, version, counts │ keys and values │ tensors' names, shapes, types, offsets │ padding │ data

The reader of the `gguf` package makes arrays of every token of the vocabulary, which takes seconds; this one reads the
header in a tenth of that and maps the tensors, which the package then dequantises.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is still in its file.

    shape: as in torch, the fastest axis last
    kind: how it is quantised
    start: byte where its data begins
    """

    file: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    def load(self) -> Tensor:
        """The values, float32.

        Raises:
            ValueError: the file ends before the data does.
        """
        block, size = GGML_QUANT_SIZES[self.kind]
        rows = (*self.shape[:-1], self.shape[-1] // block * size)
        if self.start + prod(rows) > self.file.stat().st_size:
            raise ValueError(f"{self.file}: the data ends too early; is the download complete?")
        packed = np.memmap(self.file, np.uint8, "r", self.start, rows)
        values = dequantize(packed, self.kind)
        return torch.from_numpy(values if values.flags.writeable else values.copy())  # never a view of the file


@dataclass(frozen=True)
class Gguf:
    """header: the keys and values; tensors: by name."""

    header: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(file: Path) -> Gguf:
    """Header and places of the tensors of a GGUF file, without reading the data.

    Raises:
        ValueError: another format or version, or a file that ends too early.
    """
    with file.open("rb") as stream:
        try:
            magic, version, count, pairs = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{file}: expected GGUF version 2 or 3, found {magic!r} version {version}")
            header = {_string(stream): _value(stream, *_numbers(stream, "I")) for _ in range(pairs)}
            places = {_string(stream): _place(stream) for _ in range(count)}
        except struct.error as error:
            raise ValueError(f"{file}: the header ends too early; is the download complete?") from error
        alignment = int(header.get("general.alignment", 32))
        data = -(-stream.tell() // alignment) * alignment
    tensors = {name: GgufTensor(file, shape, kind, data + offset) for name, (shape, kind, offset) in places.items()}
    return Gguf(header, tensors)


def _numbers(stream: BinaryIO, kinds: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{kinds}", stream.read(struct.calcsize(f"<{kinds}")))


def _string(stream: BinaryIO) -> str:
    (length,) = _numbers(stream, "Q")
    data = stream.read(min(length, 1 << 24))  # a corrupt length must not ask for all memory
    if len(data) != length:
        raise struct.error
    return data.decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        item, count = _numbers(stream, "IQ")
        return [_value(stream, item) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"unknown GGUF value type {kind}")
    return _numbers(stream, _SCALARS[kind])[0]


def _place(stream: BinaryIO) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
    """(shape, kind, offset from the start of the data) of one tensor. The file names the fastest axis first."""
    (axes,) = _numbers(stream, "I")
    shape = _numbers(stream, f"{axes}Q")
    kind, offset = _numbers(stream, "IQ")
    return shape[::-1], GGMLQuantizationType(kind), offset
