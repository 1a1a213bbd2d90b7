"""Chameleon's and Emu3's tokenizers against transformers' own classes, with small random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3VQVAE,
    JanusVQVAE,
    JanusVQVAEConfig,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor, smart_resize

from mm.configure import RecipeError
from mm.media import ImageFacts
from mm.tokenizers.autoencoder import to_grid
from mm.tokenizers.published import ChameleonTokenizer, Emu3Tokenizer, NativeSize

LANGUAGE = {
    "vocab_size": 4000,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
VQGAN = {"base_channels": 32, "channel_multiplier": [1, 2, 1], "num_res_blocks": 1, "latent_channels": 32}


def picture(width: int, height: int, seed: int = 0) -> PillowImage.Image:
    """Smooth colours with sharp edges, so that every filter leaves its mark."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return PillowImage.fromarray(coarse).resize((width, height), PillowImage.Resampling.NEAREST)


PICTURES = [picture(64, 64), picture(150, 97, 1), picture(97, 200, 2), picture(40, 33, 3)]


# ---------------------------------------------------------------------------------------------------------- Chameleon


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole language model in several files, of which one or two hold the tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chameleon")
    vq = VQGAN | {"embed_dim": 8, "num_embeddings": 48, "resolution": 64}
    vocabulary = {f"IMGIMG{'ABCDEFGHIJ'[n]}Z": n + 4 for n in range(10)} | {"<image>": 3}
    config = ChameleonConfig(**LANGUAGE, vq_config=vq, vocabulary_map=vocabulary)
    ChameleonForConditionalGeneration(config).save_pretrained(folder, max_shard_size="200KB")
    size = {"shortest_edge": 64}
    ChameleonImageProcessorPil(size=size, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_chameleon_prepares_pictures_as_its_image_processor_does(chameleon: Path) -> None:
    tokenizer, processor = ChameleonTokenizer(str(chameleon)), ChameleonImageProcessorPil.from_pretrained(chameleon)
    for item in PICTURES:
        prepared = tokenizer.transform.prepare(item)
        expected = processor(item, return_tensors="pt")["pixel_values"]
        found = tokenizer.normalise(prepared[None])
        torch.testing.assert_close(found, expected, rtol=0, atol=0.0078 + 1e-6)  # one of 255 shades
        assert (found - expected).abs().gt(1e-5).float().mean() < 0.005


def test_chameleon_gives_the_codes_of_transformers(chameleon: Path) -> None:
    tokenizer = ChameleonTokenizer(str(chameleon))
    reference: Any = ChameleonForConditionalGeneration.from_pretrained(chameleon).model.vqmodel
    pixels = torch.stack([tokenizer.transform.prepare(item) for item in PICTURES])
    expected = reference.encode(tokenizer.normalise(pixels)).image_tokens
    assert tokenizer.codes == 48
    assert tokenizer.transform.features == (16, 16)
    assert len(expected.unique()) > 5
    found = tokenizer.codes_of(list(pixels), [(16, 16)] * 4)
    assert np.concatenate(found).tolist() == expected.tolist()


def test_chameleon_draws_with_a_decoder_of_vqgan(chameleon: Path, tmp_path: Path) -> None:
    """Janus has such a decoder in transformers: it counts levels from the coarsest, and adds attention to that one."""
    torch.manual_seed(1)
    janus = JanusVQVAE(JanusVQVAEConfig(**VQGAN, embed_dim=8, num_embeddings=48, num_patches=16)).eval()
    janus.decoder.up[0].attn = nn.ModuleList()
    levels = len(janus.decoder.up)
    weights = {}
    for name, tensor in janus.decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(levels - 1 - int(parts[1]))
        weights[".".join(["decoder", *parts])] = tensor.contiguous()
    save_file(weights | {"loss.weight": torch.zeros(1)}, tmp_path / "vqgan.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    codes = torch.randint(0, 48, (2 * 256,), generator=torch.Generator().manual_seed(0))
    for file in ("vqgan.safetensors", "vqgan.ckpt"):
        tokenizer = ChameleonTokenizer(str(chameleon), decoder=str(tmp_path / file))
        with torch.no_grad():
            latents = tokenizer.vq.post_quant_conv(to_grid(tokenizer.vq.quantize.embedding(codes), (16, 16)))
            expected = janus.decoder(latents.clone())
            found = tokenizer.decoder(latents)
            pictures = tokenizer.decode(codes, [(16, 16)] * 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert [one.shape for one in pictures] == [(64, 64, 3)] * 2


def test_chameleon_without_a_decoder_says_what_draws(chameleon: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Set the option `decoder` to the vqgan\.ckpt"):
        ChameleonTokenizer(str(chameleon)).decode(torch.zeros(256, dtype=torch.int64), [(16, 16)])
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="does not hold the decoder of this tokenizer"):
        ChameleonTokenizer(str(chameleon), decoder=str(tmp_path / "other.safetensors"))


# --------------------------------------------------------------------------------------------------------------- Emu3


@pytest.fixture(scope="module")
def emu3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("emu3")
    vq = VQGAN | {"embed_dim": 4, "codebook_size": 40, "latent_channels": 4, "hidden_size": 32, "attn_resolutions": [2]}
    config = Emu3Config(text_config=LANGUAGE | {"pad_token_id": 0}, vq_config=vq, vocabulary_map={"<image>": 3})
    Emu3ForConditionalGeneration(config).save_pretrained(folder)
    Emu3ImageProcessor(
        min_pixels=32 * 32, max_pixels=64 * 96, spatial_factor=4, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
    ).save_pretrained(folder)
    return folder


def test_native_sizes_are_those_of_transformers() -> None:
    transform = NativeSize(8, 512 * 512, 1024 * 1024)
    for width, height in [(512, 512), (640, 480), (100, 80), (4000, 3000), (1333, 50), (37, 900), (1024, 1024)]:
        expected = smart_resize(height, width, 8, 512 * 512, 1024 * 1024)
        assert transform.size(height, width) == expected
        assert transform.grid(ImageFacts(width, height)) == (expected[0] // 8, expected[1] // 8)
    assert min(transform.size(1, 10_000)) == 8  # transformers refuses it; a plan goes on


def test_emu3_gives_the_codes_and_pictures_of_transformers(emu3: Path) -> None:
    """transformers pads a batch to its largest picture, which changes the others' codes: one by one here."""
    tokenizer, processor = Emu3Tokenizer(str(emu3)), Emu3ImageProcessor.from_pretrained(emu3)
    model: Any = Emu3ForConditionalGeneration.from_pretrained(emu3)
    reference: Emu3VQVAE = model.model.vqmodel
    grids = [tokenizer.transform.grid(ImageFacts(*item.size)) for item in PICTURES]
    found = tokenizer.codes_of([tokenizer.transform.prepare(item) for item in PICTURES], grids)
    drawn = tokenizer.decode(torch.from_numpy(np.concatenate(found)).long(), grids)
    assert len(set(grids)) == 4
    for item, grid, codes, given_back in zip(PICTURES, grids, found, drawn, strict=True):
        inputs = processor(item, return_tensors="pt")
        (expected,) = reference.encode(inputs["pixel_values"], inputs["image_sizes"]).image_tokens
        assert tuple(expected.shape) == grid
        assert (codes == expected.flatten().numpy()).all()
        with torch.no_grad():
            pixels = reference.decode(expected[None])
        (reference_picture,) = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
        difference = given_back.int() - torch.from_numpy(np.array(reference_picture)).int()
        assert difference.abs().max() <= 1  # transformers cuts what we round


# ------------------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("kind", [ChameleonTokenizer, Emu3Tokenizer])
def test_a_fingerprint_tells_weights_apart_and_is_known_before_they_are_read(
    kind: type[ChameleonTokenizer | Emu3Tokenizer], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue("chameleon" if kind is ChameleonTokenizer else "emu3")
    tokenizer = kind(str(folder))
    with torch.device("meta"):
        meta = kind(str(folder))
    assert meta.fingerprint == tokenizer.fingerprint
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert (meta.codes, meta.transform) == (tokenizer.codes, tokenizer.transform)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("a copy")
    assert kind(str(tmp_path)).fingerprint == tokenizer.fingerprint
    tokenizer.vq.quantize.embedding.weight.data[0] += 1
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(
        {f"vqmodel.{n}": t.contiguous() for n, t in tokenizer.vq.state_dict().items()}, tmp_path / "model.safetensors"
    )
    assert kind(str(tmp_path)).fingerprint != tokenizer.fingerprint


def test_weights_of_another_architecture_are_refused(chameleon: Path, tmp_path: Path) -> None:
    for file in chameleon.glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RecipeError, match=r"has no model\.safetensors"):
        ChameleonTokenizer(str(tmp_path))
    save_file({"vqmodel.quantize.embedding.weight": torch.zeros(3, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=r"tensors make a ChameleonVQVAE, and \d+ of them are missing"):
        ChameleonTokenizer(str(tmp_path))


def test_a_name_is_read_from_the_cache_of_the_hub(
    chameleon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files without a part of the tokenizer are not asked for; the commit is the identity of the weights."""
    commit = "1" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
    shutil.copytree(chameleon, snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
    where = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in where.items() if "vqmodel." in name}
    others = {file.name for file in snapshot.glob("*.safetensors")} - needed
    assert others
    for file in others:
        (snapshot / file).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    expected, found = ChameleonTokenizer(str(chameleon)), ChameleonTokenizer("someone/model")
    prepared = [expected.transform.prepare(item) for item in PICTURES]
    assert np.array_equal(found.codes_of(prepared, [(16, 16)] * 4), expected.codes_of(prepared, [(16, 16)] * 4))
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("2" * 40)
    snapshot.rename(snapshot.with_name("2" * 40))
    assert ChameleonTokenizer("someone/model").fingerprint != found.fingerprint
    with pytest.raises(RecipeError, match="'someone/other' is no folder here, nor a name that the hub gives"):
        ChameleonTokenizer("someone/other")


def test_a_vq_model_alone_is_read_too(chameleon: Path, tmp_path: Path) -> None:
    whole = ChameleonTokenizer(str(chameleon))
    ChameleonVQVAE(whole.config).save_pretrained(tmp_path)
    whole.processor.save_pretrained(tmp_path)
    assert ChameleonTokenizer(str(tmp_path)).codes == 48
