"""A real tokenizer of pictures that needs no training: every patch of 8 × 8 pixels becomes the nearest of K colours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from mm.encoders.base import Grid, Transform
from mm.media import Facts, ImageFacts
from mm.sample import Modality
from mm.tokenizers.base import MediaTokenizer

PATCH = 8


class Patches(Transform):
    """A picture as (3, rows · 8, columns · 8) in [0, 1], scaled up to whole patches."""

    modality = Modality.IMAGE

    def grid(self, facts: Facts) -> Grid:
        assert isinstance(facts, ImageFacts)
        return math.ceil(facts.height / PATCH), math.ceil(facts.width / PATCH)

    def prepare(self, item: Any) -> Tensor:
        rows, columns = self.grid(ImageFacts(*item.size))
        whole = item.resize((columns * PATCH, rows * PATCH), PillowImage.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(whole, np.float32) / 255).permute(2, 0, 1)

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        patches = [item.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4) for item in prepared]
        return {"patches": torch.cat([one.reshape(-1, 3 * PATCH * PATCH) for one in patches])}

    def dummy(self) -> tuple[Tensor, Grid]:
        return torch.zeros(3, PATCH, PATCH), (1, 1)


class PatchColours(MediaTokenizer):
    """K colours; those of a cube of four levels a channel, or the (K, 3) values in [0, 1] of a ``.npy`` file."""

    colours: Tensor

    def __init__(self, colours: str | None = None) -> None:
        super().__init__()
        self.transform = Patches()
        levels = np.linspace(0.125, 0.875, 4, dtype=np.float32)
        values = np.load(colours) if colours else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
        self.register_buffer("colours", torch.tensor(values, dtype=torch.float32))
        self.codes = len(values)
        content = Path(colours).read_bytes() if colours else b"cube"
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def encode(self, patches: Tensor) -> Tensor:
        means = patches.view(len(patches), 3, -1).mean(-1)
        return torch.cdist(means, self.colours).argmin(-1)

    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        pixels = (self.colours[codes] * 255).round().to(torch.uint8)
        items = zip(pixels.split([rows * columns for rows, columns in grids]), grids, strict=True)
        return [one.view(*grid, 3).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1) for one, grid in items]
