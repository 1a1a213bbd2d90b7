"""Quantisers: from the latents of an autoencoder to codes, and back.

    VectorQuantiser         the nearest of K vectors, which follow the latents by moving averages
    FiniteScalarQuantiser   a few levels a channel; nothing is learnt beside the autoencoder

What is nearest, and how gradients pass, is vector-quantize-pytorch's. Its codebook would follow every forward, and draw
from torch's generator: then a run would depend on its micro-batches and could not be resumed. Here statistics are kept
over a step and summed over all processes before the codebook follows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mm.bounds import Share, Vocabulary, Width
from mm.layers.precision import wide, wide_dtype

RESTARTS = 256
"""Codes that are restarted in a step at most: as many latents travel between processes."""

UNUSED = 1e-4
"""Use that a codebook begins with, so little that what the first steps do not use restarts at their latents."""


class Quantised(NamedTuple):
    """n latents as codes.

    latents: (n, C) what the codes stand for; gradients pass through to what was quantised
    codes: (n,) int64
    commitment: (n,) squared distance of each latent from its code, mean over channels, which draws the latent only
    """

    latents: Tensor
    codes: Tensor
    commitment: Tensor


class Quantiser(nn.Module, ABC):
    """Latents to codes. Set `width` and `codes` in ``__init__``.

    width: C, channels of a latent; codes: K
    """

    width: int
    codes: int

    @abstractmethod
    def forward(self, latents: Tensor, draws: Tensor | None = None) -> Quantised:
        """Quantise (n, C) latents, each on its own.

        Args:
            draws: (n,) float64 in (0, 1), a random number for each latent: in training, what is to be learnt of them is
                kept until `learn`. None learns nothing.
        """

    @abstractmethod
    def look_up(self, codes: Tensor) -> Tensor:
        """(n, C) latents that (n,) codes stand for."""

    @abstractmethod
    def flops(self, rows: int) -> float:
        """Forward FLOPs of this many latents."""

    def learn(self, finite: bool) -> None:
        """Follow the latents of a step; all processes call it together, after the update.

        Args:
            finite: whether there was an update; else the step is forgotten.
        """


class FiniteScalarQuantiser(Quantiser):
    """FSQ (Mentzer et al. 2024): every channel is squashed and rounded to one of its levels.

    Args:
        levels: of each channel; K is their product. The paper's table 1: (8, 8, 8) for 512, (8, 6, 5) for 240,
            (8, 5, 5, 5) for 1000, (7, 5, 5, 5, 5) for 4375, (8, 8, 8, 6, 5) for 15360.
    """

    def __init__(self, *, levels: Sequence[int]) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        self.width, self.codes = len(levels), math.prod(levels)
        with torch.device("cpu"):  # it computes with the levels while it is built
            self.scalar = FSQ(list(levels))

    def forward(self, latents: Tensor, draws: Tensor | None = None) -> Quantised:
        quantised, codes = self.scalar(latents[None])
        nothing = latents.new_zeros(len(latents), dtype=wide_dtype(latents.dtype))
        return Quantised(quantised[0], codes[0].long(), nothing)

    def look_up(self, codes: Tensor) -> Tensor:
        return self.scalar.indices_to_codes(codes[None])[0]

    def flops(self, rows: int) -> float:
        return 0.0


class _Step(NamedTuple):
    """What a codebook is to learn from a step, so far on this process.

    counts: (K,) latents of each code; sums: (K, C) their sums
    chosen: (R, C) latents at which codes may restart; priorities: (R,) of which the highest come first
    """

    counts: Tensor
    sums: Tensor
    chosen: Tensor
    priorities: Tensor


class VectorQuantiser(Quantiser):
    """A codebook of moving averages of the latents that are nearest (van den Oord et al. 2017, appendix A).

    A code that hardly any latent is near to is restarted at a latent of the step. Latents are drawn with a probability
    proportional to their squared distance from the codebook, as k-means++ does (Arthur and Vassilvitskii 2007): where
    most latents are alike, such as of white paper, the others are what is missing.

    Args:
        codes: K.
        width: C.
        distance: euclidean; or cosine, where latents and codes have length 1 (Yu et al. 2022).
        decay: share of the averages that a step keeps.
        restart_below: share of the mean use of a code, over the same steps, below which a code is restarted; 0 restarts
            none.
        gradient: straight_through, or the rotation_trick (Fifty et al. 2025).
    """

    def __init__(
        self,
        *,
        codes: Vocabulary,
        width: Width = 16,
        distance: Literal["cosine", "euclidean"] = "cosine",
        decay: Share = 0.99,
        restart_below: float = 0.05,
        gradient: Literal["straight_through", "rotation_trick"] = "straight_through",
    ) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.width, self.codes = width, codes
        self.decay, self.restart_below = decay, restart_below
        self.normalises = distance == "cosine"
        self.nearest = VectorQuantize(
            width,
            codes,
            use_cosine_sim=self.normalises,
            rotation_trick=gradient == "rotation_trick",
            commitment_weight=0.0,
            threshold_ema_dead_code=0,
            ema_update=False,
            freeze_codebook=True,
            sync_codebook=False,
        )
        self.book.cluster_size.fill_(UNUSED)
        self.book.embed_avg.copy_(UNUSED * self.book.embed)
        self._step: _Step | None = None

    @property
    def book(self) -> Any:
        """The library's codebook: `embed` (1, K, C), and its moving averages `cluster_size` and `embed_avg`."""
        return self.nearest._codebook

    def forward(self, latents: Tensor, draws: Tensor | None = None) -> Quantised:
        quantised, codes, _ = self.nearest(latents[None])
        codes = codes[0]
        exact = wide(latents)
        if self.normalises:
            exact = F.normalize(exact, dim=-1)
        commitment = (exact - self.look_up(codes)).square().mean(1)
        if self.training and draws is not None:
            self._keep(exact.detach(), codes, commitment.detach(), draws)
        return Quantised(quantised[0], codes, commitment)

    def look_up(self, codes: Tensor) -> Tensor:
        return self.book.embed[0][codes]

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.codes * self.width

    @torch.no_grad()
    def _keep(self, latents: Tensor, codes: Tensor, distances: Tensor, draws: Tensor) -> None:
        """Add n latents to the step. An exponential race: log(u) / w is highest with probability w / Σw."""
        step = self._step or self._nothing()
        priorities = torch.cat([step.priorities, draws.log() / distances.double().clamp(min=1e-12)])
        order = priorities.topk(len(step.priorities)).indices
        self._step = _Step(
            step.counts + torch.bincount(codes, minlength=self.codes),
            step.sums.index_add(0, codes, latents),
            torch.cat([step.chosen, latents])[order],
            priorities[order],
        )

    def _nothing(self) -> _Step:
        restarts = min(self.codes, RESTARTS)
        empty = self.book.embed.new_zeros
        return _Step(
            empty(self.codes),
            empty(self.codes, self.width),
            empty(restarts, self.width),
            empty(restarts, dtype=torch.float64).fill_(-math.inf),
        )

    @torch.no_grad()
    def learn(self, finite: bool) -> None:
        step, self._step = self._step or self._nothing(), None
        if not finite:
            return
        step = _over_processes(step)
        if not step.counts.any():
            return
        self.book.cluster_size.lerp_(step.counts[None], 1 - self.decay)
        self.book.embed_avg.lerp_(step.sums[None], 1 - self.decay)
        self.book.update_ema()
        self._restart(step)

    def _restart(self, step: _Step) -> None:
        """Put the codes that are used least, of those used too little, at the chosen latents, as if used on average."""
        use = self.book.cluster_size[0]
        mean = use.mean()
        dead = (use < self.restart_below * mean).sum()
        number = int(torch.minimum(dead, step.priorities.isfinite().sum()))
        codes = use.argsort(stable=True)[:number]
        self.book.embed[0, codes] = step.chosen[:number]
        self.book.embed_avg[0, codes] = step.chosen[:number] * mean
        self.book.cluster_size[0, codes] = mean


def _over_processes(step: _Step) -> _Step:
    """The step of all processes together, the same on each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return step
    for part in (step.counts, step.sums):
        dist.all_reduce(part)
    chosen, priorities = (torch.cat(_gathered(part.contiguous())) for part in (step.chosen, step.priorities))
    order = priorities.topk(len(step.priorities)).indices
    return step._replace(chosen=chosen[order], priorities=priorities[order])


def _gathered(part: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return parts
