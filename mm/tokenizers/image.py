"""Pictures as codes: an autoencoder with a quantiser in the middle, of any size.

(N, H, W, 3) uint8 ─PixelEncoder─▶ latents (N·h·w, C) ─Quantiser─▶ codes (N·h·w,) ─look up, PixelDecoder─▶ pictures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from mm.bounds import Few, Width
from mm.configure import Component, RecipeError, build
from mm.encoders.base import Grid
from mm.encoders.shapes import trace
from mm.encoders.vision import ImageTransform, Resize
from mm.tokenizers.autoencoder import AutoencoderConfig, PixelDecoder, PixelEncoder, to_bytes, to_grid, to_rows, to_unit
from mm.tokenizers.base import MediaTokenizer, fingerprint
from mm.tokenizers.quantise import Quantised, Quantiser


class ImageAutoencoder(MediaTokenizer):
    """A convolutional autoencoder of pictures of one size, such as `mm train` trains.

    Args:
        size: pixels a side, or (rows, columns).
        channels, multipliers, blocks, patch, attention, groups: see `mm.tokenizers.autoencoder.AutoencoderConfig`. A
            place of the grid is ``patch · 2^(levels − 1)`` pixels a side.
        quantiser: a `Quantiser`, ``{_target_: …}``.
        resize: see `mm.encoders.vision.Resize`.

    flops: forward FLOPs of one picture, by ``encoder``, ``quantiser`` and ``decoder``
    """

    transform: ImageTransform

    def __init__(
        self,
        *,
        size: int | tuple[int, int],
        channels: Width,
        multipliers: Sequence[int],
        quantiser: Component,
        blocks: Few = 2,
        patch: Few = 1,
        attention: bool = False,
        groups: Width = 32,
        resize: Resize = "squash",
    ) -> None:
        super().__init__()
        config = AutoencoderConfig(channels, tuple(multipliers), blocks, patch, attention, groups)
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows % config.factor or columns % config.factor:
            raise RecipeError(
                f"size: a picture of {rows} × {columns} pixels does not divide into places of {config.factor} pixels a "
                f"side, which patch={patch} and {len(multipliers)} levels make"
            )
        self.transform = ImageTransform((rows, columns), (rows // config.factor, columns // config.factor), resize)
        self.quantiser = build(quantiser, Quantiser)
        self.codes = self.quantiser.codes
        self.encoder = PixelEncoder(config, self.quantiser.width)
        self.decoder = PixelDecoder(config, self.quantiser.width)
        latents, encoder = trace(self.encoder, torch.empty(1, 3, rows, columns, device="meta"))
        _, decoder = trace(self.decoder, latents)
        nearest = self.quantiser.flops(latents[0, 0].numel())
        self.flops = {"encoder": encoder, "quantiser": nearest, "decoder": decoder}
        self.fingerprint = fingerprint([json.dumps([rows, columns, asdict(config), dict(quantiser), resize])])

    def encode(self, pixels: Tensor) -> Tensor:
        return self.quantise(to_unit(pixels, self.dtype)).codes

    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        for grid in grids:
            if grid != self.transform.features:
                raise ValueError(f"{grid} is no grid of this tokenizer: all pictures have {self.transform.features}")
        latents = self.quantiser.look_up(codes).to(self.dtype)
        return list(to_bytes(self.reconstruct(latents)))

    @property
    def dtype(self) -> torch.dtype:
        """Of compute."""
        return self.encoder.conv_in.weight.dtype

    def quantise(self, unit: Tensor, draws: Tensor | None = None) -> Quantised:
        """Latents and codes of (N, 3, H, W) pixels in [-1, 1], N·h·w of them."""
        return self.quantiser(to_rows(self.encoder(unit)), draws)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) pixels around [-1, 1] of (N·h·w, C) latents."""
        return self.decoder(to_grid(latents, self.transform.features))
