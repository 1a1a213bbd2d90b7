"""What the layers of a decoder need to know of the flat stream beside its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from mm.layers.context import Context
from mm.layers.layout import Layout
from mm.layers.rope import Rotation

Routing = Literal["choice", "auxiliary"]
"""How tokens come to experts and layers: these choose among the tokens of a pack, as in training; or auxiliary routers
say of each token by itself whether it would have been chosen, and then nothing depends on later tokens."""


class Cache(Protocol):
    """Keys and values of earlier tokens, as attention sees them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(T, H, d) attention of new tokens, after their keys and values were kept for `layer`."""
        ...


@dataclass
class Reports:
    """What layers have to say beside their output.

    balance: Σ over packs of tokens · loss of balance, of every group of experts that tokens choose
    imitation: of every auxiliary router (Σ cross-entropy, Σ agreement, number) over the choices that it imitates
    untaken: of every group of experts that choose, (tokens that none took, tokens); outside of training
    """

    balance: list[Tensor] = field(default_factory=list)
    imitation: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    untaken: list[tuple[Tensor, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Stream:
    """The same for every layer, but that a layer which leaves tokens out gives the others a stream of their own.

    rotation: RoPE of every token
    layout: documents, packs and groups
    backend: of `mm.layers.attention.attend`
    cache: keys and values of earlier calls while generating
    context: the devices that hold the stream together, if several do
    routing: see `Routing`
    draws: whether dropout and noise are drawn
    reports: what layers have to say
    """

    rotation: Rotation
    layout: Layout
    backend: str = "auto"
    cache: Cache | None = None
    context: Context | None = None
    routing: Routing = "choice"
    draws: bool = False
    reports: Reports = field(default_factory=Reports)

    def select(self, kept: Tensor) -> Stream:
        """The stream of some of its tokens.

        Args:
            kept: (k,) int64 positions, ascending, on the device.
        """
        rotation = Rotation(*(values.index_select(0, kept) for values in self.rotation))
        return replace(self, rotation=rotation, layout=self.layout.select(kept.cpu()))
