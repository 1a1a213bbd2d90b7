"""Mixture of depths: some layers are computed for a part of the tokens only, the others pass them as they are.

    (T, D) ─router─▶ the c · n tokens of each pack with the highest score ─layer─▶ h + g · (layer(h) − h)
                     the others ────────────────────────────────────────────────▶ h

A token that is left out takes no part in attention either: neither as query nor as key (Raposo et al. 2024, section 3;
in MoMa, arXiv 2407.21770, section 2.3, on every other layer, before tokens go to their modality's experts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.bounds import Few, Share
from mm.layers.layout import Layout
from mm.model.experts import AuxiliaryRouter, scores, taken
from mm.model.stream import Stream


@dataclass(frozen=True)
class Depth:
    """`depth:` of a decoder.

    capacity: share of the tokens of a pack that a routed layer is computed for
    every: routed are the layers 0, every, 2 · every, …
    auxiliary: with auxiliary routers, which decide token by token
    """

    capacity: Share = 0.25
    every: Few = 2
    auxiliary: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"depth.capacity is {self.capacity}; expected a share of the tokens in (0, 1]")
        if self.every < 1:
            raise ValueError(f"depth.every is {self.every}; expected at least 1")

    def routes(self, layer: int) -> bool:
        """Whether the layer of this number is for a part of the tokens."""
        return layer % self.every == 0


class DepthRouter(nn.Module):
    """Chooses the tokens that a layer is computed for."""

    def __init__(self, width: int, options: Depth) -> None:
        super().__init__()
        self.options = options
        self.score = nn.Linear(width, 1, bias=False)
        self.auxiliary = AuxiliaryRouter(width, 1) if options.auxiliary else None

    def forward(self, hidden: Tensor, stream: Stream, layer: Callable[[Tensor, Stream], Tensor]) -> Tensor:
        """(T, D) after the layer, where it was computed.

        Args:
            layer: (k, D) and the stream of k tokens to (k, D).
        """
        logits = scores(hidden, self.score).squeeze(1)
        kept = self._choose(hidden, logits, stream)
        chosen = hidden.index_select(0, kept)
        gates = logits.index_select(0, kept).sigmoid().to(hidden.dtype)[:, None]
        change = layer(chosen, stream.select(kept)) - chosen
        return hidden.index_add(0, kept, gates * change)

    def _choose(self, hidden: Tensor, logits: Tensor, stream: Stream) -> Tensor:
        """(k,) positions, ascending."""
        real = real_tokens(stream.layout)
        if stream.routing == "auxiliary" and self.auxiliary is not None:
            return real[self.auxiliary(hidden.index_select(0, real)).squeeze(1) > 0]
        kept = highest(logits.detach(), stream.layout, self.options.capacity)
        if self.auxiliary is not None:
            chosen = torch.zeros(len(hidden), 1, dtype=torch.bool, device=hidden.device)
            chosen[kept] = True
            imitated = self.auxiliary.imitation(hidden.index_select(0, real), chosen.index_select(0, real))
            stream.reports.imitation.append(imitated)
        return kept


def real_tokens(layout: Layout) -> Tensor:
    """(n,) positions of the tokens that are no padding, ascending, on the device."""

    def find() -> Tensor:
        if layout.groups is None:
            return torch.arange(layout.tokens, device=layout.device)
        return (layout.groups >= 0).nonzero().squeeze(1).to(layout.device)

    return layout.derive("real tokens", find)


def highest(logits: Tensor, layout: Layout, capacity: float) -> Tensor:
    """(k,) positions of the real tokens with the highest scores, a share of every pack, ascending."""
    real = real_tokens(layout)
    packs = layout.pack_of_token.to(layout.device)[real]
    by_score = logits[real].argsort(descending=True, stable=True)
    order = by_score[packs[by_score].argsort(stable=True)]  # pack by pack, each by score
    counts = packs.bincount(minlength=1)
    rank = torch.arange(len(real), device=real.device) - (counts.cumsum(0) - counts)[packs[order]]
    kept = rank < taken(counts, 1, capacity)[packs[order]]
    return real[order[kept]].sort().values
