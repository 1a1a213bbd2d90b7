"""Next-token prediction with a weight per token, normalised over the global batch.

``L = Σ_t w_t (nll_t + λ lse_t²) / Σ_t w_t``, both sums over all tokens of all micro-batches of all ranks, so that
packing, accumulation and world size do not change the optimum. With modality weights, w_t is the token's weight in the
batch times that of its modality. Normalised by modality, it is ``L = Σ_m c_m Σ_{t∈m} w_t (…) / Σ_{t∈m} w_t``, where
many tokens of one modality do not outweigh few of another. Where tokens choose among experts, their loss of balance is
added, a sum over packs divided by Σ_t w_t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import terminal
from mm.bounds import Factor, Share
from mm.configure import RecipeError
from mm.layers.head_loss import Backend, HeadLoss
from mm.model.multimodal import MultimodalLM
from mm.model.trainable import Trainable
from mm.objectives.base import Examined, Objective, loss_sums
from mm.packing.batch import IGNORE, Batch
from mm.packing.collate import Processor
from mm.sample import Modality

logger = terminal.logger(__name__)

EDGES = tuple(2.0**power for power in range(-5, 4))
"""Between the bins of token weights in what is reported."""

BINS = (f"below {EDGES[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(EDGES)), f"from {EDGES[-1]:g}")


@dataclass(frozen=True)
class NextToken(Objective):
    """`objective:` of a recipe.

    z_loss: λ (1e-5 in Chameleon); 0 leaves the term out
    modality_weights: factors c_m on the weights of labels by their modality, 1 where none is named. 0 leaves a modality
        out of the loss and of what it is divided by. The begin and end of an item's codes are text
    normalise: divide by the weights of all labels together, or the losses of each modality by those of its own labels
        (BAGEL, arXiv 2505.14683) before they are added up
    label_smoothing: share of the target that is spread evenly over all words and codes
    backend: who computes the loss of the head, see `mm.layers.head_loss`
    """

    z_loss: Factor = 0.0
    modality_weights: dict[str, Factor] = field(default_factory=dict)
    normalise: Literal["together", "by_modality"] = "together"
    label_smoothing: Share = 0.0
    backend: Backend = "reference"

    name = "next_token"

    def __post_init__(self) -> None:
        allowed = [modality.label for modality in Modality]
        for name, weight in self.modality_weights.items():
            if name not in allowed:
                raise RecipeError(f"objective.modality_weights names {name!r}; expected {', '.join(allowed)}")
            if not 0 <= weight < math.inf:
                raise RecipeError(f"objective.modality_weights.{name} is {weight}; expected a finite number from 0 on")
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(
                f"objective.label_smoothing is {self.label_smoothing}; expected a share from 0 to below 1"
            )

    def check(self, model: Trainable) -> None:
        if not isinstance(model, MultimodalLM):
            raise RecipeError(
                "objective: next_token predicts tokens and the recipe trains an autoencoder; say\n"
                "  objective: {_target_: mm.objectives.reconstruction.Reconstruction}"
            )

    def prepare(self, model: Trainable, processor: Processor, device: torch.device) -> None:
        assert isinstance(model, MultimodalLM)  # `check` has seen to it
        model.ids = processor.vocabulary.size
        replace(self.head_loss, real=model.ids).check(device)
        config = model.decoder.config
        if config.couples and not config.is_causal:
            logger.warning(
                "experts or layers choose among all tokens of a pack, later ones too, also in validation: its loss is "
                "not what a causal model would have. Auxiliary routers measure that (mm.objectives.routers)"
            )

    @property
    def learned(self) -> frozenset[Modality]:
        return frozenset(modality for modality in Modality if self._factor(modality))

    @property
    def head_loss(self) -> HeadLoss:
        """What the head is asked for."""
        return HeadLoss(self.z_loss, self.label_smoothing, backend=self.backend)

    def losses(self, sources: Sequence[str]) -> list[str]:
        modalities = [f"modality/{modality.label}" for modality in Modality]
        bins = [f"weights/{kind}/{name}" for kind in ("tokens", "loss") for name in BINS]
        return ["total", *modalities, *(f"source/{name}" for name in sources), "weights/mean", "weights/square", *bins]

    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Σw over the micro-batches of a step on this rank; the caller sums it over ranks."""
        together = {self.name: float(sum(self._weighted(batch).weights.double().sum() for batch in batches))}
        if self.normalise == "together":
            return together
        sums = sum(_by_modality(batch) for batch in batches)
        assert isinstance(sums, Tensor)
        own = zip(Modality, sums.tolist(), strict=True)  # a modality left out of the loss is nothing to learn from
        return together | {_own(modality): weight if self._factor(modality) else 0.0 for modality, weight in own}

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This batch's share of the step's loss, and detached (Σwℓ, Σw) for the meters.

        The sums are named ``total``, ``modality/text`` … by the label's modality, and ``source/NAME``, and as
        `weight_sums` says.
        """
        weighted = self._weighted(batch)
        everything = max(denominators[self.name], 1e-12)
        if self.normalise == "together":
            predicted: Any = model(weighted, self.head_loss)
            total = torch.stack([predicted.total, *predicted.reports.balance]).sum() / everything
        else:
            predicted = model(self._normalised(batch, denominators), self.head_loss)
            total = torch.stack([predicted.total, *(one / everything for one in predicted.reports.balance)]).sum()
        return total, weighted_sums(weighted, predicted.nll, sources) | weight_sums(weighted, predicted.nll)

    def examine(self, model: nn.Module, batch: Batch, sources: Sequence[str]) -> Examined:
        """The losses, and how many tokens no expert took where experts choose."""
        batch = self._weighted(batch)
        predicted: Any = model(batch, self.head_loss)
        return Examined(
            loss_sums(weighted_sums(batch, predicted.nll, sources)) | untaken_sums(predicted.reports.untaken)
        )

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return super().figures(sums) | untaken_figures(sums)

    def _weighted(self, batch: Batch) -> Batch:
        """The batch with the weights of its labels multiplied by those of their modalities."""
        if not self.modality_weights:
            return batch
        factors = torch.tensor([self._factor(modality) for modality in Modality])
        return replace(batch, weights=batch.weights * _of_label(factors, batch))

    def _normalised(self, batch: Batch, denominators: Mapping[str, float]) -> Batch:
        """The batch with float64 weights c_m w_t / Σ_m w, of which the loss is the plain sum."""
        sums = {modality: denominators[_own(modality)] for modality in Modality}
        factors = [self._factor(modality) / weight if weight else 0.0 for modality, weight in sums.items()]
        of_label = _of_label(torch.tensor(factors, dtype=torch.float64), batch)
        return replace(batch, weights=batch.weights.double() * of_label)

    def _factor(self, modality: Modality) -> float:
        return self.modality_weights.get(modality.label, 1.0)


def _own(modality: Modality) -> str:
    """Name of the denominator of a modality."""
    return f"{NextToken.name}/{modality.label}"


def _of_label(values: Tensor, batch: Batch) -> Tensor:
    """(T,) a value for each modality, by that of the label: the next token of the same document."""
    return values[batch.modality.roll(-1).long()].to(batch.weights.device, non_blocking=True)


def _by_modality(batch: Batch) -> Tensor:
    """(M,) float64 Σw of the labels of each modality."""
    kinds = _of_label(torch.eye(len(Modality), dtype=torch.float64), batch)  # (T, M)
    return kinds.T @ batch.weights.double()


UNTAKEN = "tokens_without_expert"


def untaken_sums(untaken: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """(2,) tokens that no expert took, and all, over the layers; nothing where no experts choose."""
    if not untaken:
        return {}
    counts = [sum(float(none) for none, _ in untaken), sum(all for _, all in untaken)]
    return {UNTAKEN: torch.tensor(counts, dtype=torch.float64)}


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


def weight_sums(batch: Batch, nll: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What the weights of the L labels are like, as pairs whose ratio is told, float64 on the device.

    ``weights/mean`` Σw / L and ``weights/square`` Σw² / L, from which the effective share of the tokens follows;
    ``weights/tokens/BIN`` the share of labels in each of `BINS`, and ``weights/loss/BIN`` their mean loss, unweighted.
    """
    weights = batch.weights[batch.labels != IGNORE].double()
    one = torch.ones_like(weights)
    bins = torch.bucketize(weights, torch.tensor(EDGES, dtype=torch.float64, device=weights.device), right=True)
    # A product, since atomic additions on a GPU would round in another order every time.
    counts, losses = (F.one_hot(bins, len(BINS)).double().T @ torch.stack([one, nll.detach().double()], 1)).unbind(1)
    labels = one.sum()
    return (
        {"weights/mean": (weights.sum(), labels), "weights/square": (weights.square().sum(), labels)}
        | {f"weights/tokens/{name}": (count, labels) for name, count in zip(BINS, counts, strict=True)}
        | {f"weights/loss/{name}": pair for name, pair in zip(BINS, zip(losses, counts, strict=True), strict=True)}
    )
