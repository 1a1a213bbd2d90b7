"""Adapters: from the features of an encoder to embeddings of the language model.

    MLP            every feature becomes one embedding
    AveragePool    the grid is pooled to a fixed one (729 → 144), then an MLP
    PixelShuffle   neighbouring features are joined in width (27 × 27 → 9 × 9, 9 times as wide), then an MLP
    ConvSubsample  strided convolutions over the frames of speech (50 → 6.25 Hz)

Items of one call may have different grids. What an item gives never depends on the others.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.bounds import Few, Width
from mm.encoders.base import Adapter, Grid


class FeedForward(nn.Sequential):
    """LayerNorm on the incoming features (optional), then one linear layer or two with GELU between.

    CNN features need the norm: ReLU6 maps are sparse and their scale differs between channels.
    """

    def __init__(self, features: int, width: int, hidden: int | None, layers: int, norm: bool) -> None:
        if layers not in (1, 2):
            raise ValueError(f"an adapter has 1 or 2 layers, not {layers}")
        hidden = hidden or width
        modules: list[nn.Module] = [nn.LayerNorm(features)] if norm else []
        if layers == 1:
            modules.append(nn.Linear(features, width))
        else:
            modules += [nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, width)]
        super().__init__(*modules)

    def flops(self, rows: int) -> float:
        """Forward FLOPs for this many rows."""
        return (
            2.0 * rows * sum(layer.in_features * layer.out_features for layer in self if isinstance(layer, nn.Linear))
        )


class GridAdapter(Adapter):
    """A rearrangement of the grid followed by a feed-forward that is local to each embedding.

    Args:
        features: width C of the incoming features, times what the rearrangement makes of it.
        width: embedding width D.
        hidden: width between the two layers; D if not given.
        layers: 1 (linear) or 2 (linear, GELU, linear).
        norm: LayerNorm on what enters the first layer.
    """

    def __init__(
        self, features: int, width: int, *, hidden: Width | None = None, layers: Few = 2, norm: bool = False
    ) -> None:
        super().__init__()
        self.feed_forward = FeedForward(features, width, hidden, layers, norm)

    @abstractmethod
    def rearrange(self, block: Tensor) -> Tensor:
        """(n, S, C') from the features (n, \\*grid, C) of n items of one grid."""

    def length(self, grid: Grid) -> int:
        return math.prod(grid)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.feed_forward(self._rearrange_all(features, grids))

    def before_last(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(ΣS, C) what the last linear layer sees of (ΣF, C) features."""
        rows = self._rearrange_all(features, grids)
        for layer in list(self.feed_forward)[:-1]:
            rows = layer(rows)
        return rows

    def flops(self, grid: Grid) -> float:
        return self.feed_forward.flops(self.length(grid))

    def _rearrange_all(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(ΣS, C') rearranged features, in the order of the items: one call per distinct grid."""
        if len(features) != sum(map(math.prod, grids)):
            raise ValueError(
                f"{len(grids)} items promise {sum(map(math.prod, grids))} features and {len(features)} came: "
                "the grids belong to other items"
            )
        if len(set(grids)) == 1:
            return self.rearrange(features.view(len(grids), *grids[0], -1)).flatten(0, 1)
        items = features.split([math.prod(grid) for grid in grids])
        out: list[Tensor] = [features] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [number for number, other in enumerate(grids) if other == grid]
            block = torch.stack([items[number] for number in members]).unflatten(1, grid)
            for number, rearranged in zip(members, self.rearrange(block), strict=True):
                out[number] = rearranged
        return torch.cat(out)


class MLP(GridAdapter):
    """Every feature becomes one embedding (LLaVA-1.5; ``layers: 1`` is LLaVA's linear projector)."""

    def rearrange(self, block: Tensor) -> Tensor:
        return block.flatten(1, -2)

    def _rearrange_all(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        return features


class AveragePool(GridAdapter):
    """Adaptive average pooling of the grid, then an MLP (Open-Qwen2VL, arXiv 2504.00595).

    Args:
        tokens: embeddings an item: (rows, columns) for pictures or a square number that means the square; (frames,) or
            a number for one-dimensional grids. A grid that is smaller along an axis keeps its own size there.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        tokens: Width | Sequence[int],
        hidden: Width | None = None,
        layers: Few = 2,
        norm: bool = False,
    ) -> None:
        super().__init__(features, width, hidden=hidden, layers=layers, norm=norm)
        self.tokens = tokens if isinstance(tokens, int) else tuple(tokens)

    def pooled(self, grid: Grid) -> Grid:
        """The grid after pooling."""
        target = self.tokens
        if isinstance(target, int):
            side = round(target ** (1 / len(grid)))
            if side ** len(grid) != target:
                raise ValueError(f"tokens: {target} is no square number; give rows and columns, such as [12, 12]")
            target = (side,) * len(grid)
        if len(target) != len(grid):
            raise ValueError(f"tokens: {list(target)} has {len(target)} axes and the features have {len(grid)}: {grid}")
        return tuple(map(min, target, grid))

    def length(self, grid: Grid) -> int:
        return math.prod(self.pooled(grid))

    def rearrange(self, block: Tensor) -> Tensor:
        pooled = self.pooled(tuple(block.shape[1:-1]))
        channels_first = block.movedim(-1, 1)
        if len(pooled) == 1:
            return F.adaptive_avg_pool1d(channels_first, pooled[0]).transpose(1, 2)
        rows, columns = pooled
        return F.adaptive_avg_pool2d(channels_first, (rows, columns)).flatten(2).transpose(1, 2)


class PixelShuffle(GridAdapter):
    """Squares of ``factor × factor`` features (runs of `factor` frames) joined in width, then an MLP (InternVL).

    The channels of a square stand row by row, so that the first C belong to its upper left feature: the order of the
    corrected InternVL release. A side that is no multiple of `factor` is filled up with zeros at its end.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        factor: Few = 2,
        axes: Few = 2,
        hidden: Width | None = None,
        layers: Few = 2,
        norm: bool = False,
    ) -> None:
        if factor < 1:
            raise ValueError(f"factor: {factor} must be at least 1")
        super().__init__(features * factor**axes, width, hidden=hidden, layers=layers, norm=norm)
        self.factor = factor
        self.axes = axes

    def length(self, grid: Grid) -> int:
        if len(grid) != self.axes:
            raise ValueError(f"axes: {self.axes} of the adapter, but the features have {len(grid)}: {grid}")
        return math.prod(-(-side // self.factor) for side in grid)

    def rearrange(self, block: Tensor) -> Tensor:
        grid = block.shape[1:-1]
        fill = [edge for side in reversed(grid) for edge in (0, -side % self.factor)]
        block = F.pad(block, (0, 0, *fill))
        for axis, side in enumerate(grid, start=1):  # (n, rows, columns, C) → (n, rows/f, f, columns/f, f, C)
            block = block.unflatten(2 * axis - 1, (-(-side // self.factor), self.factor))
        outer, inner = range(1, 2 * self.axes, 2), range(2, 2 * self.axes + 1, 2)
        return block.permute(0, *outer, *inner, -1).flatten(1 + self.axes).flatten(1, self.axes)


class ConvSubsample(Adapter):
    """Speech frames subsampled by strided convolutions, then a residual bottleneck (BLSP, arXiv 2309.00916).

    Every convolution (kernel 5, stride 2, padding 2, gated by GLU) gives ``floor((frames − 1) / 2) + 1`` frames, so
    three of them take 50 Hz to 6.25 Hz. Items are padded to the longest and zeroed beyond their own end after every
    layer, which is what a convolution over the item alone reads there.

    Args:
        convolutions: how often the frame rate is halved, at least once.
        bottleneck: inner width of ``x + W₂ gelu(W₁ x)``, which has no biases.
    """

    KERNEL = 5

    def __init__(self, features: int, width: int, *, convolutions: Few = 3, bottleneck: Width = 512) -> None:
        super().__init__()
        if convolutions < 1:
            raise ValueError(f"convolutions: {convolutions} must be at least 1")
        widths = [features] * convolutions + [width]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, 2 * after, self.KERNEL, stride=2, padding=self.KERNEL // 2)
            for before, after in pairwise(widths)
        )
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def length(self, grid: Grid) -> int:
        (frames,) = grid
        for _ in self.convolutions:
            frames = _halved(frames)
        return frames

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        lengths = [math.prod(grid) for grid in grids]
        padded = nn.utils.rnn.pad_sequence(list(features.split(lengths)), batch_first=True).transpose(1, 2)
        for convolution in self.convolutions:
            lengths = [_halved(length) for length in lengths]
            own = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            padded = F.glu(convolution(padded), dim=1) * own.to(padded.device)[:, None]
        index = own.flatten().nonzero().squeeze(1).to(padded.device)
        hidden = padded.transpose(1, 2).flatten(0, 1).index_select(0, index)
        return self.norm(hidden + self.up(F.gelu(self.down(hidden))))

    def flops(self, grid: Grid) -> float:
        (frames,) = grid
        total = 0.0
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            frames = _halved(frames)
            total += 2.0 * frames * self.KERNEL * convolution.in_channels * convolution.out_channels
        return total + 4.0 * frames * self.down.in_features * self.down.out_features


def _halved(frames: int) -> int:
    return (frames - 1) // 2 + 1
