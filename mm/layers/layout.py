"""How a flat stream is divided into documents, derived once a batch and used by every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

SHORT = 64
"""Documents up to this many tokens share a bucket with shorter ones: for them a call costs more than its arithmetic."""

PADDING = 0.1
"""Largest share of padding, in real tokens, that a bucket of short documents may take on to save calls."""

Derived = TypeVar("Derived")


class Share(NamedTuple):
    """Part `index` of `count` equal ones."""

    index: int
    count: int

    def of(self, tokens: int) -> slice:
        """This part of a stream of so many tokens.

        Raises:
            ValueError: they do not divide.
        """
        if tokens % self.count:
            raise ValueError(f"a stream of {tokens} tokens does not divide into {self.count} equal parts")
        held = tokens // self.count
        return slice(self.index * held, (self.index + 1) * held)


WHOLE = Share(0, 1)
"""All of it."""


@dataclass(frozen=True)
class Bucket:
    """Documents of nearly one length L, gathered as a dense (n, L) block; shorter ones are padded at the end.

    Under a causal mask no token sees what follows it, so padding at the end changes nothing before it.

    index: (n, L) int64 positions in the stream; padding repeats the first token of its own document
    real: (n, L) bool; False at padding
    """

    length: int
    index: Tensor
    real: Tensor


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

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", branches: Sequence[int] | None = None
    ) -> Self:
        """The layout of n documents with these lengths, one after another."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        marks = None if branches is None else torch.tensor(branches, dtype=torch.int32)
        return cls(offsets, torch.device(device), marks)

    def derive(self, key: Hashable, build: Callable[[], Derived]) -> Derived:
        """``build()``, computed once for this layout and key: masks and indices that every layer shares."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

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
    def document_of_token(self) -> Tensor:
        """(T,) int64 number of the document that each token belongs to, on the device."""
        documents = torch.arange(len(self.lengths)).repeat_interleave(self.offsets.diff().long())
        return documents.to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64 positions from 0 in every document, on the device, for streams without branches."""
        starts = self.offsets[:-1].long().repeat_interleave(self.offsets.diff().long())
        return (torch.arange(self.tokens) - starts).to(self.device)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Documents grouped by length, longest first: equal lengths together, short ones also with nearly equal ones.

        The grouping depends on the lengths alone, so what a document holds never decides how another is computed.
        """
        lengths = self.lengths
        by_length = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for i in by_length:
            if groups and self._fits(lengths[i], [lengths[j] for j in groups[-1]]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return [self._bucket(group) for group in groups]

    @staticmethod
    def _fits(length: int, group: list[int]) -> bool:
        longest = group[0]
        if longest == length:
            return True
        return longest <= SHORT and longest * (len(group) + 1) <= (1 + PADDING) * (sum(group) + length)

    def _bucket(self, documents: list[int]) -> Bucket:
        lengths = self.offsets.diff().long()[documents]
        starts = self.offsets[:-1].long()[documents]
        places = torch.arange(int(lengths[0])).expand(len(documents), -1)
        real = places < lengths[:, None]
        index = starts[:, None] + places * real
        return Bucket(int(lengths[0]), index.to(self.device), real.to(self.device))
