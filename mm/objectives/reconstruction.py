"""Training an autoencoder: what it gives back is to be what it was given.

``L = Σ_n (a |x−x̂| + b (x−x̂)² + p d(x, x̂) + c commitment − g D(x̂) + hinge_D) / Σ_n 1``, sums over all pictures of
all micro-batches of all ranks; every term is a mean over the pixels, features, places or patches of a picture. Pixels
are in [-1, 1]. The discriminator's hinge loss (Lim and Ye 2017) trains the discriminator only, in the same backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.bounds import Factor
from mm.configure import RecipeError
from mm.layers.precision import wide
from mm.model.autoencoder import JudgedAutoencoder, Reconstructed
from mm.model.trainable import Trainable
from mm.objectives.base import Examined, Objective, loss_sums
from mm.packing.batch import Batch
from mm.packing.collate import Processor
from mm.sample import Modality
from mm.tokenizers.autoencoder import to_bytes

SHOWN, COLUMNS = 12, 1600
"""Pictures that are shown of a validation split at most, and pixels in a row of them."""

GAP = 2  # pixels between shown pictures

PARTS = ("absolute", "squared", "perceptual", "commitment", "generator", "discriminator")
"""Terms of the loss."""


JUDGES = {"perceptual": "perceptual", "adversarial": "discriminator"}
"""Terms of the loss, and the part of `model.autoencoder` that each needs."""


@dataclass(frozen=True)
class Reconstruction(Objective):
    """`objective:` of a recipe with `model.autoencoder`. Each option is the weight of a term; 0 leaves it out.

    absolute, squared: of differences of pixels
    perceptual: distance of the features of `model.autoencoder.perceptual`
    commitment: how far latents are from their codes; FSQ has none
    adversarial: of fooling `model.autoencoder.discriminator`, which then trains as well
    """

    absolute: Factor = 1.0
    squared: Factor = 0.0
    perceptual: Factor = 0.0
    commitment: Factor = 0.25
    adversarial: Factor = 0.0

    name = "reconstruction"

    def check(self, model: Trainable) -> None:
        if not isinstance(model, JudgedAutoencoder):
            raise RecipeError(
                "objective: reconstruction trains an autoencoder and the recipe has a language model; say "
                "`model.autoencoder` instead of `model.decoder`, or take another objective"
            )
        for term, judge in JUDGES.items():
            if getattr(self, term) and judge not in model.judges:
                raise RecipeError(
                    f"objective.{term} is {getattr(self, term)} and there is no model.autoencoder.{judge}; add it, or "
                    "set the weight to 0"
                )

    def prepare(self, model: Trainable, processor: Processor, device: torch.device) -> None:
        assert isinstance(model, JudgedAutoencoder)  # `check` has seen to it
        model.asked = frozenset(judge for term, judge in JUDGES.items() if getattr(self, term))

    def losses(self, sources: Sequence[str]) -> list[str]:
        return ["total", *(f"part/{part}" for part in PARTS), *(f"source/{name}" for name in sources)]

    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The number of pictures."""
        return {self.name: float(sum(_pictures(batch) for batch in batches))}

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        return self._scored(model(batch), batch, denominators, sources)

    def examine(self, model: nn.Module, batch: Batch, sources: Sequence[str]) -> Examined:
        """Sums of losses and PSNR, and how often each code is used; the first pictures above what became of them."""
        found: Reconstructed = model(batch)
        _, parts = self._scored(found, batch, {self.name: 1.0}, sources)
        given_back = to_bytes(found.pixels)
        decibels = psnr(found.target, given_back)
        sums = loss_sums(parts)
        sums["psnr"] = torch.stack([decibels.sum(), decibels.new_tensor(len(decibels))])
        sums["codes"] = torch.bincount(found.codes.flatten(), minlength=_codes(model)).double()
        return Examined(sums, side_by_side(found.target, given_back) if len(found.target) else None)

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses; ``validation/psnr`` in dB, mean over pictures; ``validation/utilisation``, the share of codes that
        occur; ``validation/perplexity`` of the distribution of codes, at most K."""
        figures = super().figures(sums)
        decibels, pictures = sums["psnr"].tolist()
        if not pictures:
            return figures
        used = sums["codes"] / sums["codes"].sum()
        return figures | {
            "validation/psnr": decibels / pictures,
            "validation/utilisation": float((used > 0).double().mean()),
            "validation/perplexity": float(torch.special.entr(used).sum().exp()),
        }

    def _scored(
        self, found: Reconstructed, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        terms = self._terms(found)
        weights = vars(self) | {"generator": self.adversarial, "discriminator": 1.0}
        own = sum(weights[name] * term for name, term in terms.items() if name != "discriminator")
        assert isinstance(own, Tensor)
        every = own + terms["discriminator"] if "discriminator" in terms else own
        share = every.sum() / max(denominators[self.name], 1e-12)
        return share, _sums(own.detach(), {name: term.detach() for name, term in terms.items()}, batch, sources)

    def _terms(self, found: Reconstructed) -> dict[str, Tensor]:
        """(N,) each, those of weight 0 left out."""
        pixels = wide(found.pixels)
        difference = (pixels - (found.target.permute(0, 3, 1, 2).to(pixels.dtype) / 127.5 - 1)).flatten(1)
        terms = {"absolute": difference.abs().mean(1), "squared": difference.square().mean(1)}
        terms["commitment"] = found.commitment
        terms = {name: term for name, term in terms.items() if getattr(self, name)}
        if found.perceptual is not None:
            terms["perceptual"] = found.perceptual
        if found.logits is not None:
            real, fake, fooled = (wide(logits) for logits in found.logits)
            terms["generator"] = -fooled.mean(1)
            terms["discriminator"] = F.relu(1 - real).mean(1) / 2 + F.relu(1 + fake).mean(1) / 2
        return terms


def psnr(target: Tensor, given_back: Tensor) -> Tensor:
    """(N,) float64 peak signal-to-noise ratio in dB of (N, H, W, 3) uint8; 100 for what is equal."""
    error = (target.double() - given_back.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def side_by_side(target: Tensor, given_back: Tensor) -> Tensor:
    """(rows, columns, 3) uint8: some pictures in a row, and below each what became of it."""
    shown = min(SHOWN, max(1, COLUMNS // target.shape[2]))
    pairs = torch.stack([target[:shown], given_back[:shown]])  # (2, n, H, W, 3)
    padded = F.pad(pairs, (0, 0, 0, GAP, 0, GAP), value=255)
    return padded.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def _codes(model: nn.Module) -> int:
    """K."""
    assert isinstance(model, JudgedAutoencoder)
    return model.tokenizer.codes


def _pictures(batch: Batch) -> int:
    media = batch.media.get(Modality.IMAGE)
    return len(media.grids) if media is not None else 0


def _sums(
    own: Tensor, terms: Mapping[str, Tensor], batch: Batch, sources: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(Σ loss, Σ pictures) in total, by term and by source, float64."""
    count = own.new_tensor(len(own), dtype=torch.float64)
    nothing = (torch.zeros_like(count), torch.zeros_like(count))
    sums = {"total": (own.double().sum(), count)}
    sums |= {f"part/{name}": (terms[name].double().sum(), count) if name in terms else nothing for name in PARTS}
    if not len(own):
        return sums | {f"source/{name}": nothing for name in sources}
    owner = batch.rows[batch.media[Modality.IMAGE].documents.cpu(), 0].to(own.device)
    pairs = torch.stack([own.double(), torch.ones_like(own, dtype=torch.float64)], 1)  # (N, 2)
    by_source = F.one_hot(owner, len(sources)).double().T @ pairs
    return sums | {f"source/{name}": (pair[0], pair[1]) for name, pair in zip(sources, by_source, strict=True)}
