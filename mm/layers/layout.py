"""How a flat stream is divided into documents, derived once a batch and used by every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from mm.layers.noise import hashed

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
    spans: None, or (T,) int32 on the CPU: 0 for a token that sees what came before; tokens of span s > 0 see all of
        their span, later ones too. Numbers are unique within a document
    packs: (P + 1,) int32 on the CPU, start of every pack, then T; tokens are compared within a pack where layers choose
        among them. None: the stream is one pack
    groups: (T,) int8 on the CPU: which group of experts every token belongs to, -1 for padding, which belongs to none.
        None: all tokens are alike
    seeds: (P,) int64 on the CPU, a random number for every pack, see `keys`. None: nothing is drawn
    """

    offsets: Tensor
    device: torch.device
    branches: Tensor | None = None
    packs: Tensor | None = None
    groups: Tensor | None = None
    seeds: Tensor | None = None
    spans: Tensor | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        branches: Sequence[int] | None = None,
        groups: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Self:
        """The layout of n documents with these lengths, one after another."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        marks = None if branches is None else torch.tensor(branches, dtype=torch.int32)
        return cls(offsets, torch.device(device), marks, groups=groups, spans=spans)

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

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all that came before it in its document, and nothing else."""
        return self.branches is None and self.spans is None

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
    def pack_of_token(self) -> Tensor:
        """(T,) int64 number of the pack that each token belongs to, on the CPU."""
        if self.packs is None:
            return torch.zeros(self.tokens, dtype=torch.int64)
        return torch.arange(len(self.packs) - 1).repeat_interleave(self.packs.diff().long())

    @cached_property
    def keys(self) -> Tensor:
        """(T,) int64 on the device: what is drawn for a token is a function of its key, see `mm.layers.noise`.

        A key is a hash of the pack's seed and the token's place in the pack, so that it depends neither on the
        micro-batch that the pack is in nor on the process.
        """
        if self.seeds is None:
            raise ValueError("this layout has no seeds, from which noise and dropout are drawn")
        packs = self.pack_of_token
        starts = torch.zeros(1, dtype=torch.int64) if self.packs is None else self.packs[:-1].long()
        return hashed(self.seeds[packs] + torch.arange(self.tokens) - starts[packs]).to(self.device)

    def select(self, kept: Tensor) -> Layout:
        """The layout of some of the tokens, as documents and packs that lack the others.

        Args:
            kept: (k,) int64 positions in the stream, ascending, on the CPU.
        """
        marks = torch.zeros(self.tokens + 1, dtype=torch.int64)
        marks[kept + 1] = 1
        before = marks.cumsum(0)  # kept tokens before every position

        def of_kept(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept]

        chosen = Layout(
            before[self.offsets.long()].int(),
            self.device,
            of_kept(self.branches),
            None if self.packs is None else before[self.packs.long()].int(),
            of_kept(self.groups),
            self.seeds,
            of_kept(self.spans),
        )
        if self.seeds is not None:
            chosen.__dict__["keys"] = self.keys[kept.to(self.device)]
        return chosen

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
