"""The contract by which a discrete modality enters the language model: its items become ids, and ids become items.

    file ─decode─▶ item ─Transform.prepare─▶ tensor ─collate─▶ inputs ─encode─▶ codes (ΣL,) ─decode─▶ items
         mm.media       (CPU, loader worker)         N items             L = prod(grid) each

Codes are written once, as a column beside the shards (``mm data tokenize``), so that training reads ids, not pixels. In
the stream a code c of a modality is the id ``codebook.first + c`` (see `mm.tokenizers.vocabulary`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mm.encoders.base import Grid, Transform


class MediaTokenizer(nn.Module, ABC):
    """Items of one modality to a grid of codes each, and back. Set `transform` and `codes` in ``__init__``.

    The codes of an item never depend on its neighbours in the batch.

    transform: the CPU side; its `grid` says, from header facts, how many codes an item gets and how they are laid out
    codes: K, size of the codebook
    fingerprint: identity of the options and of the weights: equal fingerprints mean equal codes
    """

    transform: Transform
    codes: int
    fingerprint: str

    @abstractmethod
    def encode(self, *args: Any, **inputs: Any) -> Tensor:
        """(ΣL,) int64 codes in [0, K) of all items, item after item, each grid in row-major order.

        Called with what `Transform.collate` gave, by keyword; a subclass names those inputs in its signature.
        """

    @abstractmethod
    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """N items from (ΣL,) codes: of pictures (rows, columns, 3) uint8."""
