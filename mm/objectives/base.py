"""What a model is trained towards, and what validation tells of it.

weights(batches) ─Σ over ranks─▶ denominators ─┐
batch ─model─▶ loss(batch, denominators) ──────┴▶ this batch's share, and (Σwℓ, Σw) by name for the meters
batch ─model─▶ examine(batch) ─Σ over batches and ranks─▶ figures
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mm.model.trainable import Trainable
from mm.packing.batch import Batch
from mm.packing.collate import Processor
from mm.sample import Modality


class Examined(NamedTuple):
    """What a validation batch shows.

    sums: of any shape, the same names on every rank; they are added up over batches and ranks
    picture: (rows, columns, 3) uint8 for a person to look at, if there is one
    """

    sums: dict[str, Tensor]
    picture: Tensor | None = None


class Objective(ABC):
    """`objective:` of a recipe. Denominators are sums over all micro-batches of all ranks of a step, so that packing,
    accumulation and world size do not change the optimum.

    total: which of its losses is minimised. Reports call ``total`` the loss of the run; another name is for one that
        must not be taken for it
    """

    total: ClassVar[str] = "total"

    @property
    def learned(self) -> frozenset[Modality] | None:
        """Modalities of the labels that it learns from; None if it learns from samples without labels too, such as
        from pixels. A sample without such a label is left out of the plan."""
        return None

    @abstractmethod
    def check(self, model: Trainable) -> None:
        """Raise `RecipeError` unless this objective can train such a model, which may be on the meta device."""

    def prepare(  # noqa: B027  (most objectives ask for nothing)
        self, model: Trainable, processor: Processor, device: torch.device
    ) -> None:
        """Tell the model what will be asked of it, before it is sharded.

        Args:
            processor: what makes the batches. device: where the model will be.

        Raises:
            RecipeError: it cannot be computed there.
        """

    @abstractmethod
    def losses(self, sources: Sequence[str]) -> list[str]:
        """Names of all losses that can occur, `total` and others, the same on every rank."""

    @abstractmethod
    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Σw by name over the micro-batches of a step on this rank; the caller sums it over ranks."""

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This batch's share of the step's loss, and detached (Σwℓ, Σw) for the meters, by the names of `losses`."""

    def examine(self, model: nn.Module, batch: Batch, sources: Sequence[str]) -> Examined:
        """What a validation batch shows: the sums of its losses, and whatever `figures` needs besides."""
        _, parts = self.loss(model, batch, dict.fromkeys(self.weights([batch]), 1.0), sources)
        return Examined(loss_sums(parts))

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What validation reports of the sums over the whole split; a loss without weight is left out."""
        pairs = {name: pair.tolist() for name, pair in sums.items() if name.startswith("loss/")}
        return {
            "validation_loss" if name == "loss/total" else f"validation_{name}": weighted / weight
            for name, (weighted, weight) in pairs.items()
            if weight
        }


def loss_sums(parts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(2,) Σwℓ and Σw of each loss, ``loss/total``, …, as `Objective.figures` expects them.

    What training tells of the weights of tokens is left out: held-out tokens all weigh 1 unless their source says more.
    """
    return {f"loss/{name}": torch.stack(pair) for name, pair in parts.items() if not name.startswith("weights/")}
