"""Published tokenizers of pictures, by transformers' classes: Chameleon's and Emu3's.

    picture ─as their image processors do─▶ uint8 ─normalise─▶ VQ model ─▶ codes ─▶ pictures

Both are parts of checkpoints of language models. Only files that hold them are fetched, and only their tensors read.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors import safe_open
from torch import Tensor, nn

from mm.configure import RecipeError
from mm.encoders.base import Grid, Transform
from mm.encoders.vision import ImageTransform
from mm.locate import locate
from mm.media import ImageFacts
from mm.pretrained import from_pretrained
from mm.sample import Modality
from mm.tokenizers.autoencoder import AutoencoderConfig, PixelDecoder, to_bytes, to_grid
from mm.tokenizers.base import MediaTokenizer, fingerprint

PART = "vqmodel."
"""What stands before the names of the tokenizer's tensors in a language model's checkpoint."""


class CentreCut(ImageTransform):
    """The shorter side to a size, then the middle of the longer one, with the rounding of transformers.

    Scaling and cutting are one resampling of the same pixels: what is cut off a very long picture is never computed.
    """

    def prepare(self, item: Pillow.Image) -> Tensor:
        rows, columns = self.size
        width, height = (int(columns * side / min(item.size)) for side in item.size)
        left, upper = (width - columns) // 2, (height - rows) // 2
        across, down = item.width / width, item.height / height
        box = (left * across, upper * down, (left + columns) * across, (upper + rows) * down)
        resized = item.resize((columns, rows), Pillow.Resampling[self.filter.upper()], box=box)
        return torch.from_numpy(np.array(resized))


@dataclass(frozen=True, slots=True)
class NativeSize(Transform):
    """Pictures in about their own size and shape.

    factor: both sides become multiples of it
    least, most: pixels of a picture; others are scaled to them
    """

    modality: ClassVar[Modality] = Modality.IMAGE

    factor: int
    least: int
    most: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) that a picture is scaled to, as transformers' `smart_resize` has it."""
        factor = self.factor
        rows, columns = (round(side / factor) * factor for side in (height, width))
        if rows * columns > self.most:
            scale = math.sqrt(height * width / self.most)
            rows, columns = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
        elif rows * columns < self.least:
            scale = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
        return rows, columns

    def grid(self, facts: ImageFacts) -> Grid:
        return tuple(side // self.factor for side in self.size(facts.height, facts.width))

    def prepare(self, item: Pillow.Image) -> Tensor:
        """(rows, columns, 3) uint8."""
        rows, columns = self.size(item.height, item.width)
        return torch.from_numpy(np.array(item.resize((columns, rows), Pillow.Resampling.BICUBIC)))

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        sizes = torch.tensor([picture.shape[:2] for picture in prepared]).reshape(-1, 2)
        return {"pixels": torch.cat([picture.flatten(0, 1) for picture in prepared]), "sizes": sizes}

    def dummy(self) -> tuple[Tensor, Grid]:
        return torch.zeros(self.factor, self.factor, 3, dtype=torch.uint8), (1, 1)


class PublishedTokenizer(MediaTokenizer):
    """A VQ model of transformers.

    Args:
        name_or_folder: name on the hub, or a folder, of the VQ model alone or of a language model that it is part of,
            with its image processor. On the meta device only the configuration (some kB) is read.
    """

    def __init__(self, name_or_folder: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        super().__init__()
        source = _Source(name_or_folder)
        whole = from_pretrained(AutoConfig, source.configuration())
        self.config: Any = getattr(whole, "vq_config", whole)
        self.processor: Any = from_pretrained(AutoImageProcessor, source.configuration())
        self.scale = [self.processor.rescale_factor / deviation for deviation in self.processor.image_std]
        self.shift = [-m / d for m, d in zip(self.processor.image_mean, self.processor.image_std, strict=True)]
        self.vq: Any = self.build(self.config)
        self.fingerprint = fingerprint(
            [self.config.to_json_string(), self.processor.to_json_string(), source.identity()]
        )
        if torch.get_default_device().type != "meta":
            _load(self.vq, source)
        self.vq.eval()

    @abstractmethod
    def build(self, config: Any) -> nn.Module:
        """The model of a configuration, without weights."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, rows, columns) of (N, rows, columns, 3) uint8."""
        scale, shift = (torch.tensor(values, device=pixels.device) for values in (self.scale, self.shift))
        return (pixels.float() * scale + shift).permute(0, 3, 1, 2)


class ChameleonTokenizer(PublishedTokenizer):
    """Chameleon's tokenizer (arXiv 2405.09818): 512 × 512 pixels to 32 × 32 codes of 8,192.

    transformers' checkpoints have its encoder only.

    Args:
        name_or_folder: see `PublishedTokenizer`.
        decoder: a ``.safetensors`` file, or the ``.ckpt`` file published by the authors, with the decoder's weights
            under VQGAN's names. Without it pictures can be read and not be drawn.
    """

    transform: ImageTransform

    def __init__(self, name_or_folder: str, *, decoder: str | None = None) -> None:
        super().__init__(name_or_folder)
        config, processor = self.config, self.processor
        self.codes = config.num_embeddings
        side, places = processor.crop_size["height"], 2 ** (len(config.channel_multiplier) - 1)
        filter: Any = Pillow.Resampling(processor.resample).name.lower()
        self.transform = CentreCut((side, side), (side // places, side // places), "crop", filter)
        self.decoder: PixelDecoder | None = None
        if decoder is not None:
            self.decoder = PixelDecoder(_vqgan(config), config.latent_channels).eval()
            if torch.get_default_device().type != "meta":
                _load_decoder(self.decoder, decoder)

    def build(self, config: Any) -> nn.Module:
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        return ChameleonVQVAE(config)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vq.encode(self.normalise(pixels)).image_tokens.flatten()

    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        if self.decoder is None:
            raise RecipeError(
                "ChameleonTokenizer has no decoder: transformers' checkpoints leave it out. Set the option `decoder` "
                "to the vqgan.ckpt of the authors' own release"
            )
        latents = to_grid(self.vq.quantize.embedding(codes), self.transform.features)
        return list(to_bytes(self.decoder(self.vq.post_quant_conv(latents))))


class Emu3Tokenizer(PublishedTokenizer):
    """Emu3's tokenizer (arXiv 2409.18869): pictures in about their own size, 8 pixels a side to a code of 32,768.

    Of videos it makes codes as well; here a picture is a video that stands still, as in Emu3. Pictures are encoded one
    by one: in a padded batch their attention and norms would see the padding.
    """

    transform: NativeSize

    def __init__(self, name_or_folder: str) -> None:
        super().__init__(name_or_folder)
        processor = self.processor
        self.codes = self.config.codebook_size
        self.transform = NativeSize(processor.spatial_factor, processor.min_pixels, processor.max_pixels)

    def build(self, config: Any) -> nn.Module:
        from transformers import Emu3VQVAE

        return Emu3VQVAE(config)

    def encode(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Codes of N pictures.

        Args:
            pixels: (Σ rows·columns, 3) uint8 of all, row by row.
            sizes: (N, 2) rows and columns.
        """
        pictures = pixels.split(sizes.prod(1).tolist())
        found = [
            self._codes(part.unflatten(0, tuple(size))) for part, size in zip(pictures, sizes.tolist(), strict=True)
        ]
        return torch.cat(found)

    def _codes(self, picture: Tensor) -> Tensor:
        """(h·w,) codes of one (rows, columns, 3) picture."""
        (codes,) = self.vq.encode(self.normalise(picture[None]), torch.tensor([picture.shape[:2]])).image_tokens
        return codes.flatten()

    def decode(self, codes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        scale, shift = (torch.tensor(values, device=codes.device)[:, None, None] for values in (self.scale, self.shift))
        pictures = []
        for part, grid in zip(codes.split([math.prod(grid) for grid in grids]), grids, strict=True):
            values = (self.vq.decode(part.reshape(1, *grid))[0] - shift) / scale
            pictures.append(values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0))
        return pictures


def _vqgan(config: Any) -> AutoencoderConfig:
    """Sizes of a VQGAN's decoder by transformers' configuration of its encoder.

    Raises:
        RecipeError: it has attention at resolutions other than the grid's.
    """
    if config.attn_resolutions:
        raise RecipeError(f"decoder: attention at resolutions {config.attn_resolutions} is not supported")
    return AutoencoderConfig(
        channels=config.base_channels,
        multipliers=tuple(config.channel_multiplier),
        blocks=config.num_res_blocks,
        patch=1,
        attention=config.attn_type == "vanilla",
        groups=32,
    )


# ------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Source:
    """A folder, or a repository on the hub, with configuration and safetensors."""

    name: str

    @property
    def folder(self) -> Path | None:
        """The folder; None for a name on the hub."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    def configuration(self) -> Path:
        """A folder with the JSON files."""
        return self.folder or self._fetch(["*.json"])

    def identity(self) -> str:
        """Of the weights: on the hub the commit, of a folder their digest."""
        if self.folder is None:
            return self.configuration().name
        return fingerprint([], self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the VQ model, under its own names.

        Raises:
            RecipeError: there are no safetensors.
        """
        index = self.configuration() / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({Path(file).name for name, file in where.items() if PART in name})
        folder = self.folder or self._fetch(["*.json", *files])
        for file in files:
            if not (folder / file).exists():
                raise RecipeError(
                    f"{self.name} has no {file}; a VQ model is read from safetensors with its config.json"
                )
            with safe_open(folder / file, framework="pt") as found:
                inside = [name for name in found.keys() if PART in name] or list(found.keys())  # noqa: SIM118
                yield from ((name.rpartition(PART)[2], found.get_tensor(name)) for name in inside)

    def _fetch(self, patterns: list[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.name, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise RecipeError(f"{self.name!r} is no folder here, nor a name that the hub gives: {error}") from error


def _load(model: nn.Module, source: _Source) -> None:
    """Fill a model.

    Raises:
        RecipeError: tensors are missing or of another shape.
    """
    wanted, found = model.state_dict(), dict(source.tensors())
    wrong = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if wrong:
        raise RecipeError(
            f"{source.name}: {len(wanted)} tensors make a {type(model).__name__}, and {len(wrong)} of them are missing "
            f"or of another shape, such as {wrong[0]}"
        )
    model.load_state_dict({name: found[name].to(tensor.dtype) for name, tensor in wanted.items()})


def _load_decoder(decoder: PixelDecoder, file: str) -> None:
    """Fill a decoder with the tensors ``decoder.…`` of a file.

    Raises:
        RecipeError: they are not those of a decoder of its sizes.
    """
    path = locate(file)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
    own = {name.removeprefix("decoder."): tensor for name, tensor in found.items() if name.startswith("decoder.")}
    try:
        decoder.load_state_dict(own)
    except RuntimeError as error:
        raise RecipeError(f"{file} does not hold the decoder of this tokenizer: {error}") from error
