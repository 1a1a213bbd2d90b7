"""Next-token prediction with a weight per token, normalised over the global batch.

``L = Σ_t w_t (nll_t + λ lse_t²) / Σ_t w_t``, both sums over all tokens of all micro-batches of all ranks, so that
packing, accumulation and world size do not change the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.packing.batch import IGNORE, Batch
from mm.sample import Modality


@dataclass(frozen=True)
class NextToken:
    """`objective:` of a recipe. `z_loss` is λ (1e-5 in Chameleon); 0 leaves the term out."""

    z_loss: float = 0.0

    name = "next_token"

    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Σw over the micro-batches of a step on this rank; the caller sums it over ranks."""
        return {self.name: float(sum(batch.weights.double().sum() for batch in batches))}

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This batch's share of the step's loss, and detached (Σwℓ, Σw) for the meters.

        The sums are named ``total``, ``modality/text`` … by the label's modality, and ``source/NAME``.
        """
        losses: Any = model(batch, z_loss=self.z_loss)
        share = losses.total / max(denominators[self.name], 1e-12)
        return share, weighted_sums(batch, losses.nll, sources)


def weighted_sums(batch: Batch, nll: Tensor, sources: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(Σwℓ, Σw) in total, per modality of the label and per source, float64 on the CPU.

    Args:
        nll: (L,) loss of the L positions that bear a label, in stream order.
    """
    predicting = (batch.labels.cpu() != IGNORE).nonzero().squeeze(1)
    nll, weights = nll.double().cpu(), batch.weights.cpu().double()[predicting]
    modality = batch.modality.cpu()[predicting + 1]  # the label is the next token of the same document
    source = batch.rows[batch.document_of_token()[predicting], 0]

    def pair(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return (weights * nll)[chosen].sum(), weights[chosen].sum()

    sums = {"total": pair(torch.ones_like(modality, dtype=torch.bool))}
    for number in modality.unique().tolist():
        sums[f"modality/{Modality(number).label}"] = pair(modality == number)
    for number in source.unique().tolist():
        sums[f"source/{sources[number]}"] = pair(source == number)
    return sums
