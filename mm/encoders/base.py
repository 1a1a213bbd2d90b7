"""The contract by which a continuous modality enters the language model.

    file ─decode─▶ item ─Transform.prepare─▶ tensor ─collate─▶ inputs ─Encoder─▶ features ─Adapter─▶ embeddings
         mm.media       (CPU, loader worker)         N items            (ΣF, C)            (ΣS, D)

`Transform` and `Adapter.length` answer, from a header alone, how many embeddings an item will give: the plan relies on
it, and `MultimodalLM` checks it. A new encoder is one subclass of each, named in a recipe by its class path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm.media import Facts
from mm.sample import Modality

Grid = tuple[int, ...]
"""How the features of one item are laid out: (rows, columns) of an image, (frames,) of speech, (groups,) of points."""


class Transform(ABC):
    """CPU side of an encoder. Small, picklable, free of weights: it travels into loader workers and the planner."""

    modality: ClassVar[Modality]

    @abstractmethod
    def grid(self, facts: Facts) -> Grid:
        """Feature grid of an item, from its header facts, without decoding it."""

    @abstractmethod
    def prepare(self, item: Any) -> Tensor:
        """Model input of one decoded item (see `mm.media.decode`)."""

    @abstractmethod
    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of `Encoder.forward` for N items. Items may differ in size; padding never leaks."""

    @abstractmethod
    def dummy(self) -> tuple[Tensor, Grid]:
        """A smallest finite prepared item and its grid, for ranks whose batch has none of this modality."""


class Encoder(nn.Module, ABC):
    """Raw items to features. Set `transform` and `width` in ``__init__``.

    The features of an item never depend on its neighbours in the batch (BatchNorm stays in eval mode, attention is
    masked), and one call encodes all N items of a micro-batch, so that every rank calls the encoder equally often.

    All tensors that it computes with are parameters or buffers: most ranks build it on the meta device and get the
    values of those from the first (`mm.train.parallel.receive`).
    """

    transform: Transform
    width: int

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """(ΣF, C) features of all items, item after item, F = prod(grid) each.

        Called with what `Transform.collate` gave, by keyword; a subclass names those inputs in its signature.
        """

    @abstractmethod
    def flops(self, grid: Grid) -> float:
        """Forward FLOPs of one item (a multiply-add counts 2)."""

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, the unit of sharding and of activation checkpointing. Empty: the encoder is one unit."""
        return []

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode. BatchNorm stays in evaluation mode: batch statistics would mix the items.

        A module is born in training mode, so ``__init__`` of an encoder with BatchNorm ends with ``self.train()``.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class Adapter(nn.Module, ABC):
    """Features of an encoder to embeddings of the language model.

    Subclasses take ``(features: int, width: int, **options)`` in ``__init__``: feature width C and embedding width D.
    """

    @abstractmethod
    def length(self, grid: Grid) -> int:
        """Number of embeddings S of an item with this feature grid."""

    @abstractmethod
    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(ΣS, D) embeddings from (ΣF, C) features of N items with these grids."""

    @abstractmethod
    def flops(self, grid: Grid) -> float:
        """Forward FLOPs for one item."""
