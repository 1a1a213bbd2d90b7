"""What `mm train` needs of a model, be it a language model or the autoencoder of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from torch import nn

from mm.encoders.base import Grid
from mm.packing.batch import Batch
from mm.packing.collate import Entrance
from mm.sample import Modality


class Trainable(nn.Module, ABC):
    """A model that the plan can count, the loop can train, and FSDP2 can shard.

    ``forward`` takes a `Batch` and whatever its objective asks for. Every rank calls it equally often, and in it every
    sharded module, whatever its batch holds.
    """

    @property
    @abstractmethod
    def entrances(self) -> dict[Modality, Entrance]:
        """How items of each modality enter, for the planner and the loader."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in the order in which they compute: the unit of sharding and of checkpointing."""

    @abstractmethod
    def trained_parts(self) -> dict[str, bool]:
        """Whether any parameter trains, by part as in `flops`."""

    @abstractmethod
    def flops(self, batch: Batch) -> dict[str, float]:
        """Forward FLOPs of a batch by part, each named as in `mm.train.meter.PARTS`."""

    @abstractmethod
    def media_flops(self, modality: Modality, grid: Grid) -> float:
        """Forward FLOPs of one item, beside those of the document that it is in."""

    @abstractmethod
    def document_flops(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) forward FLOPs of documents of (n,) tokens, beside those of their items."""

    def after_update(self, finite: bool) -> None:
        """Learn what is learnt without gradients. All processes call it together, after every step.

        Args:
            finite: whether the parameters were updated; else the step is to leave no trace.
        """


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())
