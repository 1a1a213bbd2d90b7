"""A linear adapter that starts from the closed-form answer instead of from noise.

    features of an item ─ridge regression─▶ mean embedding of the words that the model is to say about it

A random adapter hands the language model vectors unlike any word, and the first steps go into finding out what a word
looks like. The regression needs one pass of the encoder over some documents and no gradient. It is ours; training a
linear map with gradients is LiMBeR (Merullo et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from mm.bounds import Between, Packs
from mm.configure import RecipeError
from mm.encoders.adapters import GridAdapter
from mm.encoders.base import Grid
from mm.model.multimodal import MultimodalLM
from mm.packing.batch import Batch
from mm.sample import Modality


@dataclass(frozen=True)
class WarmStartOptions:
    """`warm_start:` of a recipe.

    packs: from the beginning of the plan, that the regression is made on
    penalty: of the ridge, in units of the features' mean variance
    """

    packs: Packs = 256
    penalty: Annotated[float, Between(0, 1e6, above=True)] = 0.2

    def __post_init__(self) -> None:
        if self.packs < 1 or self.penalty <= 0:
            raise RecipeError(f"warm_start needs packs ≥ 1 and a penalty > 0, not {self.packs} and {self.penalty}")


@torch.no_grad()
def warm_start(model: MultimodalLM, batches: Iterable[Batch], end: int, penalty: float) -> None:
    """Set the linear adapters of a model in place, by the batches' media and words.

    Args:
        batches: on the model's device; the same on every process, so that all of them compute the same.
        end: id of the token that ends a document, which is no word.

    Raises:
        RecipeError: an adapter is not linear.
    """
    sums = {modality: Moments.zeros(model, modality) for modality in model.modalities}
    for batch in batches:
        for modality, media in batch.media.items():
            inputs = _inputs(model, modality, media.inputs, media.grids)
            documents = batch.document_of_token().to(media.slots.device)[media.slots]
            targets, told = _said(batch, model.decoder.embed, len(batch.offsets) - 1, end)
            has_words = told[documents]
            sums[modality].add(inputs[has_words], targets[documents][has_words])
    scale = model.decoder.embedding.weight.float().pow(2).mean().sqrt()
    for modality, moments in sums.items():
        if moments.count:
            _set(_linear(model, modality), *moments.solve(penalty), scale)


class Moments:
    """Sums from which a ridge regression follows: counts, means and products of inputs (C) and targets (D)."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.count = 0
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(targets, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, targets, dtype=torch.float64, device=device)

    @classmethod
    def zeros(cls, model: MultimodalLM, modality: Modality) -> Moments:
        layer = _linear(model, modality)
        return cls(layer.in_features, layer.out_features, layer.weight.device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count (n, C) inputs with their (n, D) targets."""
        inputs, targets = inputs.double(), targets.double()
        self.count += len(inputs)
        self.x += inputs.sum(0)
        self.y += targets.sum(0)
        self.xx += inputs.T @ inputs
        self.xy += inputs.T @ targets

    def solve(self, penalty: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(C, D) coefficients, (C,) mean input, (D,) mean target and the mean square of what the coefficients give."""
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        ridge = penalty * covariance.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)
        coefficients = torch.linalg.solve(covariance + ridge, self.xy / self.count - torch.outer(x, y))
        power = ((covariance @ coefficients) * coefficients).sum() / len(y)
        return coefficients, x, y, power


def _set(layer: nn.Linear, coefficients: Tensor, x: Tensor, y: Tensor, power: Tensor, scale: Tensor) -> None:
    """Write the map into a layer. Regression shrinks; what it gives is stretched to the length of token embeddings."""
    coefficients = coefficients * (scale / power.sqrt())
    layer.weight.copy_(coefficients.T)
    layer.bias.copy_(y - x @ coefficients)


def _said(batch: Batch, embed: Callable[[Tensor], Tensor], documents: int, end: int) -> tuple[Tensor, Tensor]:
    """(n, D) mean embedding of the words of each document that bear loss, and (n,) whether it has any."""
    bears = (batch.weights > 0) & (batch.labels != end)
    words = batch.labels[bears]
    owner = batch.document_of_token().to(words.device)[bears]
    embeddings = embed(words)
    sums = embeddings.new_zeros(documents, embeddings.shape[1]).index_add(0, owner, embeddings)
    counts = torch.bincount(owner, minlength=documents)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def _linear(model: MultimodalLM, modality: Modality) -> nn.Linear:
    adapter = model.adapters[modality.label]
    layers = [layer for layer in adapter.modules() if isinstance(layer, nn.Linear)]
    if not isinstance(adapter, GridAdapter) or len(layers) != 1:
        raise RecipeError(
            f"warm_start needs a linear adapter (`layers: 1` of MLP, AveragePool or PixelShuffle); that of "
            f"{modality.label} is {type(adapter).__name__} with {len(layers)} layers"
        )
    return layers[0]


def _inputs(model: MultimodalLM, modality: Modality, inputs: dict[str, Tensor], grids: Sequence[Grid]) -> Tensor:
    """(ΣS, C) what the linear layer of the adapter sees."""
    adapter = model.adapters[modality.label]
    assert isinstance(adapter, GridAdapter)
    return adapter.before_last(model.encoders[modality.label](**inputs), grids)
