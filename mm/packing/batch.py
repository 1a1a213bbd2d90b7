"""A micro-batch: one flat stream of T tokens that holds whole documents, with no batch dimension.

tokens    5 5 5 5 812 94 2 | 5 5 77 31 2 | 0 0      T: documents end to end, then padding
modality  i i i i t   t  t | s s t  t  t | t t
labels    - - - 812 94 2 - | …                      already shifted; the last token of a document bears none

On the way from a loader worker only the encoders' inputs travel in shared memory, where every tensor costs a file
descriptor and a connection to the worker, 0.3 ms in all. The many small tensors travel as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mm.encoders.base import Grid
from mm.layers.layout import WHOLE, Share
from mm.sample import Modality

IGNORE = -100
"""Label of a position that bears no loss (the value that `torch.nn.functional.cross_entropy` ignores)."""


@dataclass(frozen=True, slots=True)
class Media:
    """All items of one modality in a batch, in stream order.

    inputs: keyword arguments of the encoder's forward, for N items
    grids: N feature grids
    slots: (S,) int64 positions in the stream where the adapter's outputs go, ascending
    documents: (N,) int64 number of the document that each item belongs to
    """

    inputs: dict[str, Tensor]
    grids: tuple[Grid, ...]
    slots: Tensor
    documents: Tensor

    def to(self, device: torch.device) -> Media:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(
            self, inputs=inputs, slots=self.slots.to(device, non_blocking=True), documents=self.documents.to(device)
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _from_arrays, _as_arrays(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of P packs with n documents.

    tokens: (T,) int64; media slots hold the pad token
    positions: (T,) int64, from 0 in every document
    labels: (T,) int64, shifted: the token that follows, or `IGNORE`
    weights: (T,) float32 loss weight of the label; 0 where there is none, and of a label that the source gives none
    modality: (T,) int8, see `Modality`; -1 for padding
    offsets: (n + 1,) int32 start of every document, then T. Padding is the last document when there is any
    packs: (P + 1,) int32 start of every pack, then T
    rows: (n, 3) int64 (number of the source, of its shard, row in it) of every document; -1 for padding
    seeds: (P,) int64 a random number for every pack, from which layers draw noise
    media: the items of each modality that occurs
    share: the part of the stream that is computed here, where several devices have the same batch. Labels are there
        only, and of the items those that reach into it
    broken: (sample, reason) of samples that could not be used and were replaced by padding of the promised length
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    modality: Tensor
    offsets: Tensor
    packs: Tensor
    rows: Tensor
    seeds: Tensor
    media: dict[Modality, Media] = field(default_factory=dict)
    broken: tuple[tuple[str, str], ...] = ()
    share: Share = WHOLE

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device. What Python reads stays on the CPU: modality, offsets, packs, rows and seeds."""
        device = torch.device(device)
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "labels", "weights")
        }
        return replace(self, **moved, media={modality: media.to(device) for modality, media in self.media.items()})

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _from_arrays, _as_arrays(self)

    @property
    def span(self) -> slice:
        """Where in the stream the share is."""
        return self.share.of(len(self.tokens))

    @property
    def real_tokens(self) -> int:
        """Tokens that belong to a sample, media slots included; of the batch's share of the stream."""
        lengths = self.offsets.clamp(self.span.start, self.span.stop).diff()
        return int(lengths[self.rows[:, 0] >= 0].sum())

    def digests(self) -> list[str]:
        """Of each pack that holds samples, a digest of which they are, in order."""
        starts, found = torch.searchsorted(self.offsets[:-1], self.packs).tolist(), []
        for first, stop in pairwise(starts):
            rows = self.rows[first:stop]
            if len(rows := rows[rows[:, 0] >= 0]):
                found.append(blake2b(rows.numpy().tobytes(), digest_size=8).hexdigest())
        return found

    def document_of_token(self) -> Tensor:
        """(T,) int64 number of the document that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1), self.offsets.diff().long())


def _as_arrays(record: Media | Batch) -> tuple[Any, ...]:
    """The class and the values of its fields, where tensors are arrays, which pickle as bytes."""
    values = (getattr(record, entry.name) for entry in fields(record))
    return type(record), *(value.numpy() if isinstance(value, Tensor) else value for value in values)


def _from_arrays(kind: Callable[..., Media | Batch], *values: Any) -> Media | Batch:
    """What `_as_arrays` took apart."""
    return kind(*(torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values))
