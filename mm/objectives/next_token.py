"""Next-token prediction with a weight per token, normalised over the global batch.

``L = Σ_t w_t (nll_t + λ lse_t²) / Σ_t w_t``, both sums over all tokens of all micro-batches of all ranks, so that
packing, accumulation and world size do not change the optimum. With modality weights, w_t is the token's weight in the
batch times that of its modality. Where tokens choose among experts, their loss of balance is added, a sum over packs
divided by the same denominator.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.configure import RecipeError
from mm.model.multimodal import MultimodalLM
from mm.model.trainable import Trainable
from mm.objectives.base import Examined, Objective, loss_sums
from mm.packing.batch import IGNORE, Batch
from mm.sample import Modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NextToken(Objective):
    """`objective:` of a recipe.

    z_loss: λ (1e-5 in Chameleon); 0 leaves the term out
    modality_weights: factors on the weights of labels by their modality, 1 where none is named. 0 leaves a modality
        out of the loss and of what it is divided by. The begin and end of an item's codes are text
    """

    z_loss: float = 0.0
    modality_weights: dict[str, float] = field(default_factory=dict)

    name = "next_token"

    def __post_init__(self) -> None:
        allowed = [modality.label for modality in Modality]
        for name, weight in self.modality_weights.items():
            if name not in allowed:
                raise RecipeError(f"objective.modality_weights names {name!r}; expected {', '.join(allowed)}")
            if not 0 <= weight < math.inf:
                raise RecipeError(f"objective.modality_weights.{name} is {weight}; expected a number from 0 on")

    def prepare(self, model: Trainable) -> None:
        if not isinstance(model, MultimodalLM):
            raise RecipeError(
                "objective: next_token predicts tokens and the recipe trains an autoencoder; say\n"
                "  objective: {_target_: mm.objectives.reconstruction.Reconstruction}"
            )
        config = model.decoder.config
        if config.couples and not config.is_causal:
            logger.warning(
                "experts or layers choose among all tokens of a pack, later ones too, also in validation: its loss is "
                "not what a causal model would have. Auxiliary routers measure that (mm.objectives.routers)"
            )

    def losses(self, sources: Sequence[str]) -> list[str]:
        modalities = [f"modality/{modality.label}" for modality in Modality]
        return ["total", *modalities, *(f"source/{name}" for name in sources)]

    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Σw over the micro-batches of a step on this rank; the caller sums it over ranks."""
        return {self.name: float(sum(self._weighted(batch).weights.double().sum() for batch in batches))}

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This batch's share of the step's loss, and detached (Σwℓ, Σw) for the meters.

        The sums are named ``total``, ``modality/text`` … by the label's modality, and ``source/NAME``.
        """
        batch = self._weighted(batch)
        predicted: Any = model(batch, z_loss=self.z_loss)
        total = torch.stack([predicted.total, *predicted.reports.balance]).sum()
        return total / max(denominators[self.name], 1e-12), weighted_sums(batch, predicted.nll, sources)

    def examine(self, model: nn.Module, batch: Batch, sources: Sequence[str]) -> Examined:
        """The losses, and how many tokens no expert took where experts choose."""
        batch = self._weighted(batch)
        predicted: Any = model(batch, z_loss=self.z_loss)
        return Examined(
            loss_sums(weighted_sums(batch, predicted.nll, sources)) | untaken_sums(predicted.reports.untaken)
        )

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return super().figures(sums) | untaken_figures(sums)

    def _weighted(self, batch: Batch) -> Batch:
        """The batch with the weights of its labels multiplied by those of their modalities."""
        if not self.modality_weights:
            return batch
        factors = torch.tensor([self.modality_weights.get(modality.label, 1.0) for modality in Modality])
        of_label = batch.modality.roll(-1).long()  # the label is the next token of the same document
        return replace(batch, weights=batch.weights * factors[of_label].to(batch.weights.device, non_blocking=True))


UNTAKEN = "tokens_without_expert"


def untaken_sums(untaken: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """(2,) tokens that no expert took, and all, over the layers; nothing where no experts choose."""
    if not untaken:
        return {}
    return {UNTAKEN: torch.tensor([sum(float(none) for none, _ in untaken), sum(all for _, all in untaken)])}


def untaken_figures(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the tokens of a layer that no expert took, mean of the layers. Without noise while training experts
    come to take the same tokens, and most go without."""
    none, all = sums.get(UNTAKEN, torch.zeros(2)).tolist()
    return {UNTAKEN: none / all} if all else {}


def weighted_sums(batch: Batch, nll: Tensor, sources: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(Σwℓ, Σw) in total, per modality of the label and per source, float64 on the device; nothing is waited for.

    Args:
        nll: (L,) loss of the L positions that bear a label, in stream order.
    """
    predicting = (batch.labels != IGNORE).nonzero().squeeze(1)
    weights = batch.weights.double()[predicting]
    pairs = torch.stack([weights * nll.detach().double(), weights])  # (2, L)
    modality = batch.modality.to(nll.device, non_blocking=True)[predicting + 1].long()  # of the token that is predicted
    source = batch.rows[:, 0].clamp(min=0)[batch.document_of_token()]  # padding bears no label
    source = source.to(nll.device, non_blocking=True)[predicting]

    def sums_by(kind: Tensor, kinds: int) -> Tensor:
        """(kinds, 2); a product, since atomic additions on a GPU would round in another order every time."""
        return F.one_hot(kind, kinds).double().T @ pairs.T

    names = [f"modality/{modality.label}" for modality in Modality] + [f"source/{name}" for name in sources]
    sums = torch.cat([sums_by(modality, len(Modality)), sums_by(source, len(sources))])
    weighted, weight = pairs.sum(1)
    return {"total": (weighted, weight)} | {name: (pair[0], pair[1]) for name, pair in zip(names, sums, strict=True)}
