"""An autoencoder in training, with the networks that judge what it gives back.

pixels ─encoder, quantiser─▶ codes ─decoder─▶ reconstruction ─┬─▶ perceptual ─▶ distance of features
                                                              └─▶ discriminator ─▶ logits of patches
Judges see pictures only: the tokenizer is complete without them, and leaves them behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mm.configure import Component, build
from mm.encoders.base import Adapter, Grid
from mm.encoders.shapes import trace
from mm.encoders.vision import VisionEncoder
from mm.layers.precision import wide
from mm.model.trainable import Trainable, trains
from mm.packing.batch import Batch
from mm.packing.collate import Entrance
from mm.packing.hashing import hash64
from mm.sample import Modality
from mm.tokenizers.autoencoder import to_unit
from mm.tokenizers.image import ImageAutoencoder


@dataclass
class AutoencoderOptions:
    """`model.autoencoder:` of a recipe that trains a tokenizer.

    tokenizer: what is trained, such as `mm.tokenizers.image.ImageAutoencoder`
    perceptual: a frozen encoder of pictures whose features are compared, such as a preset of ``encoders/``
    discriminator: see `PatchDiscriminator`
    """

    tokenizer: Component
    perceptual: Component | None = None
    discriminator: Component | None = None


class Logits(NamedTuple):
    """(N, P) what the discriminator says of each patch; above 0 is real.

    real: of the pictures; fake: of the reconstructions. Both train the discriminator and nothing else
    fooled: of the reconstructions as well, and trains the autoencoder and nothing else
    """

    real: Tensor
    fake: Tensor
    fooled: Tensor


class Reconstructed(NamedTuple):
    """N pictures and what became of them.

    target: (N, H, W, 3) uint8; pixels: (N, 3, H, W) of the reconstruction, around [-1, 1]
    codes: (N, L) int64
    commitment: (N,) mean over the grid, see `Quantised`
    perceptual: (N,) distance of features, None where it was not asked for
    logits: of patches, None where they were not asked for
    """

    target: Tensor
    pixels: Tensor
    codes: Tensor
    commitment: Tensor
    perceptual: Tensor | None
    logits: Logits | None

    def without_pictures(self) -> Reconstructed:
        """Nothing of it, with a gradient of 0 for all that took part."""
        logits = self.logits and Logits(*(part[:0] for part in self.logits))
        distance = self.perceptual if self.perceptual is None else self.perceptual[:0]
        return Reconstructed(self.target[:0], self.pixels[:0], self.codes[:0], self.commitment[:0], distance, logits)


class PatchDiscriminator(nn.Module):
    """Tells for each patch of a picture whether it is real (Isola et al. 2017, section 3.2.2).

    Its norms are GroupNorms: a picture is judged on its own.

    Args:
        width: channels after the first convolution; doubled by every later one, up to eight times.
        layers: convolutions of stride 2.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**layer, 8) for layer in range(layers)]
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs in pairwise(widths):
            modules += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, P) logits of (N, 3, H, W) pixels in [-1, 1]."""
        return self.layers(pixels).flatten(1)


class PerceptualDistance(nn.Module):
    """How far apart the features are that an encoder gives for two pictures.

    Features are scaled to length 1 at every place of the map, and squared differences are summed over channels and
    averaged over places, as LPIPS does (Zhang et al. 2018, eq. 1, with all weights 1, of one layer).
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """(N,) distances of (N, 3, H, W) pixels in [-1, 1] from others."""
        with torch.no_grad():
            wanted = self._features(target)
        return (self._features(pixels) - wanted).square().sum(-1).mean((1, 2))

    def _features(self, unit: Tensor) -> Tensor:
        size = self.encoder.transform.size
        if unit.shape[2:] != size:
            unit = F.interpolate(unit, size, mode="bilinear", antialias=True)
        bytes = (wide(unit) + 1) * 127.5
        scale, shift = (bytes.new_tensor(values)[:, None, None] for values in (self.encoder.scale, self.encoder.shift))
        features = self.encoder.tower((bytes * scale + shift).to(unit.dtype))
        return F.normalize(wide(features), dim=-1)


class Places(Adapter):
    """Stands where a language model has an adapter: an item takes as many tokens of the plan as its grid has places."""

    def length(self, grid: Grid) -> int:
        return math.prod(grid)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        return features

    def flops(self, grid: Grid) -> float:
        return 0.0


class JudgedAutoencoder(Trainable):
    """The tokenizer that is trained, and the judges of its reconstructions.

    asked: names of the judges that `forward` asks, all that there are unless the objective wants fewer
    """

    updates: Tensor

    def __init__(
        self,
        tokenizer: ImageAutoencoder,
        perceptual: VisionEncoder | None = None,
        discriminator: PatchDiscriminator | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.judges = nn.ModuleDict()
        if perceptual is not None:
            self.judges["perceptual"] = PerceptualDistance(perceptual)
        if discriminator is not None:
            self.judges["discriminator"] = discriminator
        self.asked = frozenset(self.judges)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._flops = self._flops_of_picture()

    @property
    def entrances(self) -> dict[Modality, Entrance]:
        return {Modality.IMAGE: Entrance(self.tokenizer.transform, Places())}

    def blocks(self) -> list[nn.Module]:
        return [*self.tokenizer.encoder.blocks(), *self.tokenizer.decoder.blocks()]

    def forward(self, batch: Batch) -> Reconstructed:
        """The pictures of a batch, encoded, decoded and judged.

        A batch without any runs a dummy, of which nothing is returned or learnt.
        """
        media = batch.media.get(Modality.IMAGE)
        if media is not None:
            return self._judged(media.inputs["pixels"], self._draws(batch))
        item, _ = self.tokenizer.transform.dummy()
        dummy = self.tokenizer.transform.collate([item])["pixels"].to(batch.tokens.device)
        return self._judged(dummy, None).without_pictures()

    def _judged(self, target: Tensor, draws: Tensor | None) -> Reconstructed:
        unit = to_unit(target, self.tokenizer.dtype)
        quantised = self.tokenizer.quantise(unit, draws)
        pixels = self.tokenizer.reconstruct(quantised.latents)
        return Reconstructed(
            target,
            pixels,
            quantised.codes.unflatten(0, (len(target), -1)),
            quantised.commitment.unflatten(0, (len(target), -1)).mean(1),
            self.judges["perceptual"](pixels, unit) if "perceptual" in self.asked else None,
            _logits(self.judges["discriminator"], pixels, unit) if "discriminator" in self.asked else None,
        )

    def _draws(self, batch: Batch) -> Tensor | None:
        """(N·L,) uniform numbers in (0, 1), a function of step, picture and place; None in evaluation."""
        if not self.training:
            return None
        rows = batch.rows[batch.media[Modality.IMAGE].documents.cpu()].numpy()
        places = np.arange(math.prod(self.tokenizer.transform.features))
        words = hash64("restarts", int(self.updates), *rows.T[:, :, None], places)  # (N, L)
        uniform = (words.ravel() >> np.uint64(11)) * 2.0**-53 + 2.0**-54
        return torch.from_numpy(uniform).to(batch.tokens.device)

    def after_update(self, finite: bool) -> None:
        self.tokenizer.quantiser.learn(finite)
        self.updates += 1

    def trained_parts(self) -> dict[str, bool]:
        tokenizer = self.tokenizer
        parts = {"encoders.image": tokenizer.encoder, "quantiser": tokenizer.quantiser, "decoder": tokenizer.decoder}
        parts |= {f"judges.{name}": judge for name, judge in self.judges.items()}
        return {name: trains(part) for name, part in parts.items()}

    def flops(self, batch: Batch) -> dict[str, float]:
        media = batch.media.get(Modality.IMAGE)
        pictures = len(media.grids) if media is not None else 0
        unasked = {f"judges.{name}" for name in self.judges.keys() - self.asked}
        return {part: pictures * flops for part, flops in self._flops.items() if part not in unasked}

    def media_flops(self, modality: Modality, grid: Grid) -> float:
        return sum(self._flops.values())

    def document_flops(self, lengths: np.ndarray) -> np.ndarray:
        return np.zeros(len(lengths))

    def _flops_of_picture(self) -> dict[str, float]:
        """What a picture costs each part, in forwards that `training_factors` makes the whole cost of.

        The perceptual encoder sees the target without gradients and the reconstruction with those of its input: 1 + 2,
        of a part that counts 2. The discriminator sees both to train, and the reconstruction once more: 3 + 3 + 2, of a
        part that counts 3.
        """
        own = self.tokenizer.flops
        parts = {"encoders.image": own["encoder"], "quantiser": own["quantiser"], "decoder": own["decoder"]}
        if "perceptual" in self.judges:
            judge = self.judges["perceptual"]
            assert isinstance(judge, PerceptualDistance)
            parts["judges.perceptual"] = 3 / 2 * judge.encoder.flops(judge.encoder.transform.features)
        if "discriminator" in self.judges:
            picture = torch.empty(1, 3, *self.tokenizer.transform.size, device="meta")
            parts["judges.discriminator"] = 8 / 3 * trace(self.judges["discriminator"], picture)[1]
        return parts


def _logits(judge: nn.Module, pixels: Tensor, target: Tensor) -> Logits:
    """What a discriminator says, in one graph in which each side's gradients stop short of the other's weights."""
    real, fake = judge(torch.cat([target, pixels.detach()])).chunk(2)
    unchanging = {name: parameter.detach() for name, parameter in judge.named_parameters()}
    return Logits(real, fake, functional_call(judge, unchanging, (pixels,)))


def build_autoencoder(options: AutoencoderOptions) -> JudgedAutoencoder:
    """The autoencoder of a recipe with its judges."""
    perceptual = discriminator = None
    tokenizer = build(options.tokenizer, ImageAutoencoder)
    if options.perceptual is not None:
        spec = {name: value for name, value in options.perceptual.items() if name != "adapter"}
        perceptual = build(spec | {"image_size": list(tokenizer.transform.size)}, VisionEncoder)
    if options.discriminator is not None:
        discriminator = build(options.discriminator, PatchDiscriminator)
    return JudgedAutoencoder(tokenizer, perceptual, discriminator)
