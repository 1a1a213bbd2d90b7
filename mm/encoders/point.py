"""Encoder of point clouds: groups of neighbours, as in Point-BERT (arXiv 2111.14819).

cloud ─unit sphere─▶ farthest points ─k nearest─▶ groups (G, K, C) ─mini-PointNet─▶ (N, G, D) ─blocks─▶ (N·G, D)
      PointTransform.prepare, on the CPU                                 + positions of the centres before every block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mm.bounds import Few, Width
from mm.encoders.base import Encoder, Grid, Transform
from mm.encoders.shapes import trace
from mm.media import PointFacts
from mm.sample import Modality


@dataclass(frozen=True, slots=True)
class PointTransform(Transform):
    """Clouds to `groups` centres with their nearest neighbours.

    points: how many points are kept of a cloud, by farthest point sampling
    groups: G, centres
    neighbours: K, points of each group
    channels: 3 coordinates, or 6 with colours. Colours are dropped, or are zeros, where a cloud has others
    """

    modality: ClassVar[Modality] = Modality.POINT

    points: int = 1024
    groups: int = 64
    neighbours: int = 32
    channels: Literal[3, 6] = 3

    def __post_init__(self) -> None:
        if self.channels not in (3, 6):
            raise ValueError(f"channels: {self.channels}; allowed: 3 (coordinates), 6 (coordinates and colours)")
        if not 0 < max(self.groups, self.neighbours) <= self.points:
            raise ValueError(
                f"{self.groups} groups of {self.neighbours} neighbours cannot be chosen from {self.points} points"
            )

    def grid(self, facts: PointFacts) -> Grid:
        return (self.groups,)

    def prepare(self, item: np.ndarray) -> Tensor:
        """(G, 1 + K, channels) float32: of every group its centre, then its points, relative to the centre.

        The cloud is centred and scaled into the unit sphere. Sampling starts at the point farthest from the middle, so
        the order of the points in the file does not matter (but for ties). A cloud with fewer points than groups
        repeats its groups in order; a group with fewer points than neighbours repeats its own: no maximum notices.
        """
        import fpsample

        cloud = np.zeros((len(item), self.channels), np.float32)
        shared = min(self.channels, item.shape[1])
        cloud[:, :shared] = item[:, :shared]
        coordinates = cloud[:, :3].astype(np.float64)
        coordinates -= coordinates.mean(axis=0)
        distance = np.sqrt((coordinates**2).sum(axis=1))
        cloud[:, :3] = coordinates / (distance.max() or 1.0)

        # Exact sampling: the package's quicker bucket variants renumber the points and start at another one.
        # It is nested: the first G points are the centres that sampling the kept points again would give.
        chosen = fpsample.fps_sampling(cloud[:, :3], min(len(cloud), self.points), start_idx=int(distance.argmax()))
        kept = torch.from_numpy(cloud[chosen.astype(np.int64)])
        centres = kept[torch.arange(self.groups) % len(kept)]
        distances = torch.cdist(centres[:, :3], kept[:, :3], compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(self.neighbours, len(kept)), largest=False, sorted=True).indices
        groups = kept[nearest[:, torch.arange(self.neighbours) % nearest.shape[1]]]
        groups[..., :3] -= centres[:, None, :3]
        return torch.cat([centres[:, None], groups], dim=1)

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"groups": torch.stack(list(prepared))}

    def dummy(self) -> tuple[Tensor, Grid]:
        return torch.zeros(self.groups, 1 + self.neighbours, self.channels), (self.groups,)


class PointGroupEncoder(Encoder):
    """A small transformer over groups of points, trained from scratch.

    Point-BERT's layout with one change: the mini-PointNet normalises every point on its own (LayerNorm) where the
    original has BatchNorm, whose statistics mix the clouds of a batch.

    Args:
        points, groups, neighbours, channels: see `PointTransform`.
        depth, width, heads: of the transformer.
    """

    transform: PointTransform

    def __init__(
        self,
        *,
        points: Width = 1024,
        groups: Width = 64,
        neighbours: Width = 32,
        channels: Literal[3, 6] = 3,
        depth: Few = 12,
        width: Width = 384,
        heads: Width = 6,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.transform = PointTransform(points, groups, neighbours, channels)
        self.width = width
        self.group = MiniPointNet(channels, width)
        self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.layers = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        _, self._flops = trace(self, torch.empty(1, groups, 1 + neighbours, channels, device="meta"))

    def forward(self, groups: Tensor) -> Tensor:
        """(N·G, C) features of N clouds.

        Args:
            groups: (N, G, 1 + K, channels) centres and their groups.
        """
        groups = groups.to(self.norm.weight.dtype)
        centres, points = groups[:, :, 0], groups[:, :, 1:]
        hidden = self.group(points)
        positions = self.position(centres[..., :3])
        for layer in self.layers:
            hidden = layer(hidden + positions)
        return self.norm(hidden).flatten(0, 1)

    def flops(self, grid: Grid) -> float:
        if grid != (self.transform.groups,):
            raise ValueError(f"{grid} is no grid of this encoder: all clouds have {self.transform.groups} groups")
        return self._flops

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


class MiniPointNet(nn.Module):
    """One vector a group: each point sees the largest values over its group once, then the largest remain."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Linear(channels, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 256))
        self.joint = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, width))

    def forward(self, points: Tensor) -> Tensor:
        """(…, width) of groups (…, K, channels)."""
        local = self.local(points)
        shared = local.amax(dim=-2, keepdim=True).expand_as(local)
        return self.joint(torch.cat([shared, local], dim=-1)).amax(dim=-2)
