"""The contract by which a discrete modality enters the language model: its items become ids, and ids become items.

    file ─decode─▶ item ─Transform.prepare─▶ tensor ─collate─▶ inputs ─encode─▶ codes (ΣL,) ─decode─▶ items
         mm.media       (CPU, loader worker)         N items             L = prod(grid) each

Codes are written once, as a column beside the shards (``mm data tokenize``), so that training reads ids, not pixels. In
the stream a code c of a modality is the id ``codebook.first + c`` (see `mm.tokenizers.vocabulary`).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm import media
from mm.encoders.base import Grid, Transform
from mm.sample import Codes, MediaPart


class MediaTokenizer(nn.Module, ABC):
    """Items of one modality to a grid of codes each, and back. Set the attributes below in ``__init__``.

    The codes of an item never depend on its neighbours in the batch.

    transform: the CPU side; its `grid` says, from header facts, how many codes an item gets and how they are laid out
    codes: K, size of the codebook
    fingerprint: identity of the options and of the weights: equal fingerprints mean equal codes. Known on the meta
        device too, where the plan asks for it and nothing is loaded, so it is taken of the weights' file
    """

    transform: Transform
    codes: int
    fingerprint: str

    @abstractmethod
    def encode(self, *args: Any, **inputs: Any) -> Tensor:
        """(ΣL,) int64 codes in [0, K) of all items, item after item, each grid in row-major order.

        Called with what `Transform.collate` gave, by keyword; a subclass names those inputs in its signature.
        """

    @torch.inference_mode()
    def codes_of(self, prepared: Sequence[Tensor], grids: Sequence[Grid]) -> list[np.ndarray]:
        """(L,) int32 codes of each of N prepared items with these grids, computed where the tokenizer is.

        Raises:
            RuntimeError: their number, or a code, is not what `grid` and `codes` promise.
        """
        if not prepared:
            return []
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        inputs = {name: tensor.to(device) for name, tensor in self.transform.collate(prepared).items()}
        found, lengths = self.encode(**inputs).to("cpu", torch.int32), [math.prod(grid) for grid in grids]
        if len(found) != sum(lengths) or not 0 <= int(found.min()) <= int(found.max()) < self.codes:
            raise RuntimeError(
                f"{type(self).__name__} gave {len(found)} codes from {found.min()} to {found.max()} for grids of "
                f"{sum(lengths)} places and a codebook of {self.codes}"
            )
        return [codes.numpy() for codes in found.split(lengths)]

    def read(self, parts: Sequence[MediaPart]) -> list[Codes]:
        """The codes of each of N files, in the same roles.

        Raises:
            BrokenMedia: a file cannot be decoded.
        """
        items = [media.decode(part) for part in parts]
        prepared = [self.transform.prepare(item) for item in items]
        found = self.codes_of(prepared, [self.transform.grid(media.measure(item)) for item in items])
        return [
            Codes(part.modality, tuple(codes.tolist()), part.role) for part, codes in zip(parts, found, strict=True)
        ]

    @abstractmethod
    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """N items from (ΣL,) codes: of pictures (rows, columns, 3) uint8."""


def fingerprint(options: Sequence[str], tensors: Iterable[tuple[str, Tensor]] = ()) -> str:
    """Identity of options and of weights by name."""
    digest = hashlib.sha256(json.dumps(list(options)).encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
