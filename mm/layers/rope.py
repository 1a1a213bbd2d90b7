"""Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face checkpoints.

positions ──rotation()──▶ cos, sin ──rotate()──▶ turned queries and keys
 (T,)      once a forward  (T, 1, d)  every layer   (T, H, d)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.layers.precision import wide_dtype


@dataclass(frozen=True)
class Rope:
    """Frequencies of the rotation.

    base: θ of frequency i = base^(−2i/d)
    scaling: a name in `SCALINGS`: how frequencies are stretched to a context longer than `original_context`
    factor: how many times longer
    low_frequency_factor, high_frequency_factor: bounds of the interpolated band, for "llama3" only
    original_context: tokens of the context before stretching, for "llama3" only
    """

    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"RoPE scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")


class Rotation(NamedTuple):
    """cos, sin: (T, 1, d) of every token's angles, the same for all heads and layers.

    Both halves of `cos` are cos θ; the halves of `sin` are −sin θ and sin θ, so that a turned head is
    ``x · cos + swapped(x) · sin``.
    """

    cos: Tensor
    sin: Tensor


def inverse_frequencies(
    rope: Rope, head_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """(d/2,) angle per position. Computed, not stored: a buffer would be lost on the meta device."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    return SCALINGS[rope.scaling](1.0 / rope.base**exponents, rope)


def rotation(rope: Rope, positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Rotation of every token.

    Args:
        rope: the frequencies.
        positions: (T,) int64.
        head_dim: d.
        dtype: of the queries and keys. Angles are float32, as in the checkpoints' own code, and float64 where it is.
    """
    wide = wide_dtype(dtype)
    angles = positions[:, None, None].to(wide) * inverse_frequencies(rope, head_dim, positions.device, wide)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """(T, H, d) queries or keys turned by their token's angles; value i is paired with value i + d/2."""
    if torch.compiler.is_compiling():  # see `mm.layers.norm.rms_norm`
        return heads * rotation.cos + heads.roll(heads.shape[-1] // 2, dims=-1) * rotation.sin
    return _Rotate.apply(heads, rotation.cos, rotation.sin)


class _Rotate(torch.autograd.Function):
    """Written out because the gradient of a rotation is the rotation back: nothing of T·H·d values is kept for it."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos).add_(swapped.mul_(sin))


def _unscaled(frequencies: Tensor, rope: Rope) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, rope: Rope) -> Tensor:
    """Position interpolation (Chen et al. 2023, eq. 3)."""
    return frequencies / rope.factor


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = rope.original_context * frequencies / (2 * math.pi)  # full turns within the original context
    band = rope.high_frequency_factor - rope.low_frequency_factor
    kept = ((turns - rope.low_frequency_factor) / band).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


SCALINGS: dict[str, Callable[[Tensor, Rope], Tensor]] = {"none": _unscaled, "linear": _linear, "llama3": _llama3}
