"""How a flat stream is divided into documents, derived once a batch and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Documents of one length L, gathered as a dense (n, L) block.

    index: (n, L) int64 positions in the stream
    """

    length: int
    index: Tensor


@dataclass(frozen=True)
class Layout:
    """Documents of a stream of T tokens; tokens of different documents never see each other.

    offsets: (n + 1,) int32 on the CPU; document i is ``offsets[i]:offsets[i + 1]``, the last entry is T
    device: where the layers run
    branches: None, or (T,) int32 on the CPU: 0 is the document's trunk; a token of branch b > 0 sees the trunk and its
        own branch, never another. One prefix with many continuations is scored in one pass this way.
    """

    offsets: Tensor
    device: torch.device
    branches: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def offsets_on_device(self) -> Tensor:
        """(n + 1,) int32 offsets for kernels with variable lengths."""
        return self.offsets.to(self.device)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Documents grouped by equal length, shortest first."""
        lengths = self.offsets.diff().long()
        starts = self.offsets[:-1].long()
        buckets = []
        for length in lengths.unique().tolist():
            if length:
                index = starts[lengths == length, None] + torch.arange(length)
                buckets.append(Bucket(length, index.to(self.device)))
        return buckets
