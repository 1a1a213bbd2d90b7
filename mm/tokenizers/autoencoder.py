"""A convolutional autoencoder laid out as VQGAN (Esser et al. 2021), without its quantiser.

    pixels (N, 3, H, W) ─stem─▶ [blocks ─ ½] × levels ─▶ middle ─▶ latents (N, C, h, w)
    latents ─▶ middle ─▶ [blocks ─ ×2] × levels ─▶ (N, 3, H, W)

Every norm is a GroupNorm: what comes out for a picture does not depend on its neighbours in the batch. Modules have the
names that VQGAN gave them, so that its decoder's weights can be loaded by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.configure import RecipeError
from mm.layers.precision import wide, wide_dtype


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of encoder and decoder.

    channels: of the finest level; multipliers: of them, a level each, from the finest; each level halves both sides
    blocks: residual blocks a level; the decoder has one more
    patch: pixels of a side that enter as one, with their colours side by side; saves the finest levels
    attention: self-attention in the middle, over the grid
    groups: of the GroupNorms; divides the channels of every level
    """

    channels: int
    multipliers: Sequence[int]
    blocks: int
    patch: int
    attention: bool
    groups: int

    def __post_init__(self) -> None:
        for width in self.widths:
            if width % self.groups:
                raise RecipeError(f"groups is {self.groups} and does not divide the {width} channels of a level")

    @property
    def widths(self) -> list[int]:
        """Channels of every level, from the finest."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def factor(self) -> int:
        """Pixels of a side of the picture that are one place of the grid."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 × 1 convolution of x where the channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class GridAttention(nn.Module):
    """Self-attention of one head over the places of the grid, without positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        q, k, v = (part(inner).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (N, h·w, C)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half as many rows and columns. The odd pixel of padding is below and to the right, as in VQGAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice as many rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inputs if number == 0 else outputs, outputs, groups) for number in range(blocks)
        )
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """What works at the resolution of the grid."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = GridAttention(width, groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class PixelEncoder(nn.Module):
    """Pixels to latents of `width` channels."""

    def __init__(self, config: AutoencoderConfig, width: int) -> None:
        super().__init__()
        widths = config.widths
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1)
        inputs = [config.channels, *widths[:-1]]
        self.down = nn.ModuleList(
            Level(before, after, config.blocks, config.groups) for before, after in zip(inputs, widths, strict=True)
        )
        for level, outputs in zip(list(self.down)[:-1], widths, strict=False):
            level.downsample = Downsample(outputs)
        self.mid = Middle(widths[-1], config.groups, config.attention)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, h, w) latents of (N, 3, H, W) pixels."""
        x = self.conv_in(F.pixel_unshuffle(pixels, self.patch))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

    def blocks(self) -> list[nn.Module]:
        """The levels and the middle, the unit of sharding and of activation checkpointing."""
        return [*self.down, self.mid]


class PixelDecoder(nn.Module):
    """Latents of `width` channels to pixels. `up` counts levels from the finest, and computes from the coarsest."""

    def __init__(self, config: AutoencoderConfig, width: int) -> None:
        super().__init__()
        widths = config.widths
        self.patch = config.patch
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups, config.attention)
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(before, after, config.blocks + 1, config.groups) for before, after in zip(inputs, widths, strict=True)
        )
        for level, outputs in zip(list(self.up)[1:], widths[1:], strict=True):
            level.upsample = Upsample(outputs)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) pixels of (N, C, h, w) latents."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)

    def blocks(self) -> list[nn.Module]:
        """The middle and the levels, in the order in which they compute."""
        return [self.mid, *reversed(self.up)]


def to_grid(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, C, h, w) of (N·h·w, C), row by row."""
    return rows.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)


def to_rows(grids: Tensor) -> Tensor:
    """(N·h·w, C) of (N, C, h, w), row by row."""
    return grids.permute(0, 2, 3, 1).flatten(0, 2)


def to_unit(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) in [-1, 1] of (N, H, W, 3) uint8."""
    return (pixels.to(wide_dtype(dtype)) / 127.5 - 1.0).permute(0, 3, 1, 2).to(dtype)


def to_bytes(unit: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 of (N, 3, H, W) around [-1, 1]; what is outside is cut."""
    return ((wide(unit) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
