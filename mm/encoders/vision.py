"""Encoders of pictures: timm, OpenCLIP and transformers vision towers.

    picture ─resize─▶ (rows, columns, 3) uint8 ─stack─▶ pixels ─normalise─▶ tower ─▶ (N, h, w, C) ─▶ (N·h·w, C)
             ImageTransform.prepare                     on the device

Bytes travel from the workers to the device, floats are made there. timm, open_clip and transformers are imported by the
encoder that needs them: a loader worker, which only unpickles an `ImageTransform`, needs none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from mm.encoders.base import Encoder, Grid, Transform
from mm.encoders.fold import fold_batch_norm
from mm.encoders.shapes import trace
from mm.layers.precision import wide_dtype
from mm.locate import locate
from mm.media import ImageFacts
from mm.pretrained import from_pretrained, no_code_of
from mm.sample import Modality

Resize = Literal["squash", "crop", "pad"]
"""How a picture comes to the fixed size of its encoder.

squash: both sides are scaled on their own. Everything stays visible: a caption may speak of what stands at the edge.
crop: the largest centred cut of the right shape. What CLIP was trained with.
pad: the whole picture in its own shape, centred on the encoder's mean colour.
"""


Filter = Literal["bicubic", "bilinear", "lanczos"]


@dataclass(frozen=True, slots=True)
class ImageTransform(Transform):
    """Pictures to one fixed size.

    size: (rows, columns) of pixels
    features: (rows, columns) of the encoder's feature map
    colour: fills what `pad` leaves free
    """

    modality: ClassVar[Modality] = Modality.IMAGE

    size: tuple[int, int]
    features: tuple[int, int]
    resize: Resize = "squash"
    filter: Filter = "bicubic"
    colour: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize: {self.resize!r}; allowed: {', '.join(get_args(Resize))}")

    def grid(self, facts: ImageFacts) -> Grid:
        return self.features

    def prepare(self, item: Pillow.Image) -> Tensor:
        """(rows, columns, 3) uint8: the picture, resized with an antialiasing filter."""
        rows, columns = self.size
        box = None
        if self.resize == "crop":
            # One resampling of the cut, not a cut of the resampled: a picture of 1 × 10,000 pixels would be scaled to
            # 2,240,000 rows first.
            scale = min(item.width / columns, item.height / rows)
            left, upper = (item.width - columns * scale) / 2, (item.height - rows * scale) / 2
            box = (left, upper, min(left + columns * scale, item.width), min(upper + rows * scale, item.height))
        elif self.resize == "pad":
            scale = min(columns / item.width, rows / item.height)
            rows, columns = max(1, round(item.height * scale)), max(1, round(item.width * scale))
        resized = item.resize((columns, rows), Pillow.Resampling[self.filter.upper()], box=box)
        if self.resize == "pad":
            canvas = Pillow.new("RGB", (self.size[1], self.size[0]), self.colour)
            canvas.paste(resized, ((self.size[1] - columns) // 2, (self.size[0] - rows) // 2))
            resized = canvas
        return torch.from_numpy(np.array(resized))

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"pixels": torch.stack(list(prepared))}

    def dummy(self) -> tuple[Tensor, Grid]:
        return torch.zeros(*self.size, 3, dtype=torch.uint8), self.features


class VisionEncoder(Encoder):
    """A tower over normalised pictures of one size.

    Args:
        tower: (N, 3, rows, columns) float to a feature map (N, h, w, C).
        size: (rows, columns) of pixels.
        mean, std: of the three channels in [0, 1], as the tower was trained with.
    """

    transform: ImageTransform

    def __init__(
        self,
        tower: nn.Module,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize,
        filter: Filter = "bicubic",
    ) -> None:
        super().__init__()
        self.tower = tower
        # Python numbers, not a buffer: they survive `to_empty` and casts of the module to another precision.
        self.scale = [1 / (255 * deviation) for deviation in std]
        self.shift = [-centre / deviation for centre, deviation in zip(mean, std, strict=True)]
        self.train()
        features, self._flops = trace(tower, torch.empty(1, 3, *size, device="meta"))
        _, rows, columns, self.width = features.shape
        red, green, blue = (round(255 * centre) for centre in mean)
        self.transform = ImageTransform(size, (rows, columns), resize, filter, (red, green, blue))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N·h·w, C) features of N pictures, row by row.

        Args:
            pixels: (N, rows, columns, 3) uint8.
        """
        return self.tower(self.normalise(pixels)).flatten(0, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, rows, columns), channels last in memory, in the tower's precision; computed in at least fp32."""
        dtype = next(self.tower.parameters()).dtype
        values = pixels.to(wide_dtype(dtype))
        for channel, (scale, shift) in enumerate(zip(self.scale, self.shift, strict=True)):
            values[..., channel].mul_(scale).add_(shift)
        return values.permute(0, 3, 1, 2).to(dtype)

    def flops(self, grid: Grid) -> float:
        if grid != self.transform.features:
            raise ValueError(f"{grid} is no grid of this encoder: all pictures have {self.transform.features}")
        return self._flops


class TimmEncoder(VisionEncoder):
    """Any ViT or convolutional network of timm: patch tokens without class and register tokens, or the feature map.

    Args:
        name: timm's name, with its tag for pretrained weights: ``vit_so400m_patch14_siglip_384.webli``.
        image_size: pixels a side, or (rows, columns); the one it was trained with if not given. The position
            embeddings of a ViT are resampled to it.
        pretrained: load timm's weights from the hub. Ignored where `weights` are given, and on the meta device.
        weights: a ``.safetensors`` or ``.pth`` file, or ``package://PACKAGE/FILE`` (see `mm.locate`).
        match: how the tensors of `weights` find their places: by name, or one by one in order, with every shape
            compared, for the same network written with other names.
        layer: None gives what timm calls the features: the last block and the final norm of a ViT, the head convolution
            of an EfficientNet. A number picks a block (a stage of a convolutional network) and leaves norm and head
            convolution out; negative ones count from the end, so -2 is the penultimate (LLaVA, Prismatic). Later blocks
            are removed.
        resize: see `Resize`.
        mean, std: of the pixels; those in timm's configuration of the weights if not given.
        fold: fold BatchNorm into the convolutions: quicker, the same features, for a network that stays frozen.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | Sequence[int] | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        match: Literal["name", "order"] = "name",
        layer: int | None = None,
        resize: Resize = "squash",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fold: bool = False,
    ) -> None:
        import timm
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(name)
        if found is None:
            raise ValueError(
                f"{name} is no model of timm; `timm.list_models('*{name.split('_')[0]}*')` lists its relatives"
            )
        size = _pair(image_size or found.input_size[1:])
        options: dict[str, Any] = {"img_size": size} if found.fixed_input_size else {}
        by_order = weights is not None and match == "order"
        if weights is not None:
            options["pretrained_cfg_overlay"] = {"file": str(locate(weights))}
        load = (pretrained or weights is not None) and not by_order and not _on_meta()
        network = timm.create_model(name, pretrained=load, **options)
        if by_order and not _on_meta():
            assert weights is not None
            load_in_order(network, weights)
        super().__init__(
            _TimmTower(network, layer, size, fold),
            size,
            mean or found.mean,
            std or found.std,
            resize,
        )

    def blocks(self) -> list[nn.Module]:
        assert isinstance(self.tower, _TimmTower)
        return self.tower.blocks()


class _TimmTower(nn.Module):
    """A timm network without its head, giving a feature map with the channels last."""

    def __init__(self, network: nn.Module, layer: int | None, size: tuple[int, int], fold: bool = False) -> None:
        super().__init__()
        model: Any = network.eval()
        if layer is None:
            model.reset_classifier(0, "")
        else:
            model.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
        if fold:
            fold_batch_norm(model, *size)
        self.network = model
        self.prefix: int | None = getattr(model, "num_prefix_tokens", None)
        self.patches: tuple[int, int] | None = None if self.prefix is None else model.patch_embed.grid_size
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        if self.patches is None:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.network.forward_features(pixels)  # type: ignore[operator]
        if features.ndim == 3:
            assert self.patches is not None
            return features[:, self.prefix :].unflatten(1, self.patches)
        return features if self.channels_last else features.permute(0, 2, 3, 1)

    def blocks(self) -> list[nn.Module]:
        return [] if self.patches is None else list(self.network.blocks)  # type: ignore[arg-type]


class OpenClipEncoder(VisionEncoder):
    """The visual tower of an OpenCLIP model: patch tokens without the class token.

    Args:
        name: OpenCLIP's name (``ViT-B-32``, ``ViT-SO400M-14-SigLIP-384``), or ``local-dir:FOLDER`` for a folder with
            ``open_clip_config.json`` and weights.
        pretrained: a tag (``laion2b_s34b_b79k``), a checkpoint file or ``package://PACKAGE/FILE``; None keeps random
            weights. Not read on the meta device.
        layer: as in `TimmEncoder`.
        resize: see `Resize`; the one that the model was trained with if not given.
    """

    def __init__(
        self, name: str, *, pretrained: str | None = None, layer: int | None = None, resize: Resize | None = None
    ) -> None:
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is not None and pretrained not in tags:
            pretrained = str(locate(pretrained))
        if _on_meta():  # the tag would fetch the weights before it looked whether they are wanted
            preprocessing = open_clip.get_pretrained_cfg(name, pretrained) if pretrained and pretrained in tags else {}
            with no_code_of(name.removeprefix("local-dir:")):
                model = open_clip.create_model(name, device="meta", load_weights=False)
        else:
            preprocessing = {}
            with no_code_of(name.removeprefix("local-dir:")):
                model = open_clip.create_model(name, pretrained=pretrained)
        expected = {**open_clip.get_model_preprocess_cfg(model), **preprocessing}
        size = _pair(expected["size"])
        visual: Any = model.visual
        if hasattr(visual, "trunk"):
            tower: nn.Module = _TimmTower(visual.trunk, layer, size)
        elif hasattr(visual, "transformer"):
            tower = _ClipTower(visual, layer)
        else:
            raise ValueError(f"{name}: its visual tower {type(visual).__name__} is no transformer")
        super().__init__(
            tower,
            size,
            expected["mean"],
            expected["std"],
            resize or _RESIZE_OF_OPEN_CLIP[expected["resize_mode"]],
            expected["interpolation"],
        )

    def blocks(self) -> list[nn.Module]:
        assert isinstance(self.tower, _TimmTower | _ClipTower)
        return self.tower.blocks()


_RESIZE_OF_OPEN_CLIP: Mapping[str, Resize] = {"shortest": "crop", "longest": "pad", "squash": "squash"}


class _ClipTower(nn.Module):
    """OpenCLIP's own vision transformer, without pooling and projection."""

    def __init__(self, visual: Any, layer: int | None) -> None:
        super().__init__()
        visual.prune_intermediate_layers([-1 if layer is None else layer], prune_norm=layer is not None)
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        last = self.visual.forward_intermediates(pixels, [-1], normalize_intermediates=True, intermediates_only=True)
        (features,) = last["image_intermediates"]
        return features.permute(0, 2, 3, 1)

    def blocks(self) -> list[nn.Module]:
        return list(self.visual.transformer.resblocks)


class TransformersVisionEncoder(VisionEncoder):
    """The vision tower of a transformers model of fixed resolution: SigLIP, SigLIP 2, CLIP, DINOv2.

    Size, mean, deviation, filter and cropping are those of the model's image processor.

    Args:
        name_or_folder: name on the hub, or a folder that `save_pretrained` wrote with its image processor.
        pretrained: load the weights. Their configuration (a few kB) is read in any case; on the meta device nothing
            else is.
        layer: as in `TimmEncoder`. None gives the model's ``last_hidden_state``, which has passed the final norm in
            SigLIP and DINOv2 and has not in CLIP.
        resize: see `Resize`; what the image processor does if not given.
    """

    def __init__(
        self,
        name_or_folder: str,
        *,
        pretrained: bool = True,
        layer: int | None = None,
        resize: Resize | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        config = from_pretrained(AutoConfig, name_or_folder)
        config = getattr(config, "vision_config", config)
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        if layer is not None:
            config.num_hidden_layers = _counted_from_start(layer, config.num_hidden_layers) + 1
        processor: Any = from_pretrained(AutoImageProcessor, name_or_folder)
        if pretrained and not _on_meta():
            model = from_pretrained(AutoModel, name_or_folder, config=config, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, trust_remote_code=False)
        super().__init__(
            _TransformersTower(model, raw=layer is not None),
            _pair(config.image_size),
            processor.image_mean,
            processor.image_std,
            resize or ("crop" if getattr(processor, "do_center_crop", False) else "squash"),
            "bilinear" if processor.resample == Pillow.Resampling.BILINEAR else "bicubic",
        )

    def blocks(self) -> list[nn.Module]:
        encoder: Any = self.tower.model.encoder  # type: ignore[union-attr]
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)


class _TransformersTower(nn.Module):
    """The last hidden state of a vision model as a map; `raw` leaves the final norm out."""

    def __init__(self, model: nn.Module, raw: bool) -> None:
        super().__init__()
        if raw:
            for name in ("post_layernorm", "layernorm"):
                if hasattr(model, name):
                    setattr(model, name, nn.Identity())
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.model(pixels).last_hidden_state
        patch = self.model.config.patch_size
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        return tokens[:, -rows * columns :].unflatten(1, (rows, columns))  # class and register tokens stand first


def load_in_order(network: nn.Module, weights: str) -> None:
    """Load a ``.pth`` file of the same network written with other names: tensor by tensor, in order.

    Raises:
        ValueError: the number of tensors or any shape differs (loading anyway would put weights into wrong layers), or
            the file is a ``.safetensors``, which keeps its tensors sorted by name.
    """
    path = locate(weights)
    if path.suffix == ".safetensors":
        raise ValueError(f"{weights}: `match: order` needs the order of a .pth file; safetensors sorts its tensors")
    given: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    own = network.state_dict()
    if len(given) != len(own):
        raise ValueError(f"{weights} holds {len(given)} tensors and {type(network).__name__} has {len(own)}")
    for (name, tensor), (own_name, own_tensor) in zip(given.items(), own.items(), strict=True):
        if tensor.shape != own_tensor.shape:
            raise ValueError(
                f"{weights}: {name} {tuple(tensor.shape)} stands where {own_name} {tuple(own_tensor.shape)} is expected"
            )
    network.load_state_dict(dict(zip(own, given.values(), strict=True)))


def _counted_from_start(layer: int, layers: int) -> int:
    if not -layers <= layer < layers:
        raise ValueError(f"layer: {layer} of a tower with {layers}")
    return layer % layers


def _on_meta() -> bool:
    """Whether modules are being built without weights, to plan."""
    return torch.get_default_device().type == "meta"


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return rows, columns
