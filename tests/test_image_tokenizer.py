"""Autoencoders that make codes of pictures: encoding, quantisers, training by `mm train`, and using what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from mm.configure import PRESET_FOLDERS, RecipeError, build, presets, resolve
from mm.model.autoencoder import AutoencoderOptions, JudgedAutoencoder, PatchDiscriminator, build_autoencoder
from mm.model.build import build_trainable
from mm.model.multimodal import ModelOptions, build_processor
from mm.objectives.base import Objective
from mm.objectives.reconstruction import Reconstruction, psnr
from mm.packing.batch import Batch
from mm.packing.materialise import MicroStep
from mm.report.run import report_of_run
from mm.sample import Modality
from mm.tokenizers.base import MediaTokenizer
from mm.tokenizers.image import ImageAutoencoder
from mm.tokenizers.quantise import FiniteScalarQuantiser, Quantiser, VectorQuantiser
from mm.train import checkpoint
from mm.train.export import export_run
from mm.train.preview import planned
from mm.train.recipe import Recipe
from mm.train.stages import RunError
from mm.train.tokenizer import TrainedTokenizer
from tests.small_world import fork_run, losses, train_here, train_together, write_recipe

GRID = (4, 6)
QUANTISERS: dict[str, dict[str, Any]] = {
    "cosine": {"_target_": "mm.tokenizers.quantise.VectorQuantiser", "codes": 12, "width": 3},
    "euclidean": {
        "_target_": "mm.tokenizers.quantise.VectorQuantiser",
        "codes": 12,
        "width": 3,
        "distance": "euclidean",
        "gradient": "rotation_trick",
    },
    "scalar": {"_target_": "mm.tokenizers.quantise.FiniteScalarQuantiser", "levels": [5, 4, 3]},
}
PERCEPTUAL = {"_target_": "mm.encoders.vision.TimmEncoder", "name": "test_efficientnet", "pretrained": False}


def options(quantiser: str = "cosine") -> dict[str, Any]:
    """A small tokenizer of pictures of 16 × 24 pixels."""
    return {
        "_target_": "mm.tokenizers.image.ImageAutoencoder",
        "size": [16, 24],
        "channels": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "patch": 2,
        "attention": True,
        "groups": 4,
        "quantiser": QUANTISERS[quantiser],
    }


def tokenizer_of(quantiser: str = "cosine") -> ImageAutoencoder:
    torch.manual_seed(2)
    return build(options(quantiser), ImageAutoencoder).eval()


def noise(pictures: int, rows: int = 16, columns: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pictures, rows, columns, 3), dtype=torch.uint8, generator=generator)


def draws(latents: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(len(latents), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.98 + 0.01


# ------------------------------------------------------------------------------------------------ encoding, decoding


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_codes_stand_row_by_row_and_decode_to_pictures(quantiser: str) -> None:
    tokenizer = tokenizer_of(quantiser)
    pixels = noise(3)
    with torch.no_grad():
        codes = tokenizer.encode(pixels)
        latents = tokenizer.encoder(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        alone = [tokenizer.quantiser(latents[n, :, row, column][None]).codes for n in range(3) for row in range(4)
                 for column in range(6)]  # fmt: skip
        decoded = tokenizer.decode(codes, [GRID] * 3)
        expected = tokenizer.decoder(tokenizer.quantiser.look_up(codes).view(3, 4, 6, -1).permute(0, 3, 1, 2))
    assert codes.dtype == torch.int64
    assert codes.tolist() == torch.cat(alone).tolist()
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codes
    assert [picture.shape for picture in decoded] == [(16, 24, 3)] * 3
    target = ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert torch.equal(torch.stack(decoded).float(), target)


def test_the_grid_that_a_transform_promises_is_the_one_that_comes_out() -> None:
    tokenizer = tokenizer_of()
    prepared = tokenizer.transform.prepare(PillowImage.new("RGB", (100, 31)))
    assert prepared.shape == (16, 24, 3)
    (codes,) = tokenizer.codes_of([prepared], [tokenizer.transform.features])
    assert len(codes) == math.prod(tokenizer.transform.features) == math.prod(GRID)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_codes_do_not_depend_on_neighbours(quantiser: str) -> None:
    tokenizer = tokenizer_of(quantiser).train()  # nothing normalises over the batch in training either
    pixels = noise(4)
    with torch.no_grad():
        together = tokenizer.encoder(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        apart = torch.cat([tokenizer.encoder(one.permute(0, 3, 1, 2) / 127.5 - 1) for one in pixels.split(1)])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        changed = torch.cat([pixels[:1], noise(3, seed=1)])
        assert torch.equal(tokenizer.encode(pixels)[:24], tokenizer.encode(changed)[:24])


def test_a_grid_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 8\) is no grid of this tokenizer"):
        tokenizer_of().decode(torch.zeros(24, dtype=torch.int64), [(3, 8)])


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RecipeError, match="18 × 24 pixels does not divide into places of 4 pixels"):
        build(options() | {"size": [18, 24]}, ImageAutoencoder)
    with pytest.raises(RecipeError, match="groups is 3 and does not divide the 8 channels"):
        build(options() | {"groups": 3}, ImageAutoencoder)


# --------------------------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_what_a_code_stands_for_has_that_code(quantiser: str) -> None:
    module = build(QUANTISERS[quantiser], Quantiser).eval()
    codes = torch.arange(module.codes)
    assert module.codes == {"cosine": 12, "euclidean": 12, "scalar": 60}[quantiser]
    assert torch.equal(module(inverse(module, codes)).codes, codes)


def inverse(module: Quantiser, codes: Tensor) -> Tensor:
    """Latents in the middle of each code's cell. FSQ squashes what it is given, so its codes are not their own."""
    if not isinstance(module, FiniteScalarQuantiser):
        return module.look_up(codes)
    levels = torch.tensor([5, 4, 3])
    half = (levels - 1) * 1.001 / 2  # of the squashing, see FSQ.bound
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    rounded = module.look_up(codes) * (levels // 2)
    return torch.atanh((rounded + offset) / half) - torch.atanh(offset / half)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_latent_gets_the_nearest_code_and_its_gradient_passes(distance: Any) -> None:
    quantiser = VectorQuantiser(codes=7, width=3, distance=distance).train()
    latents = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = quantiser(latents)
    given = F.normalize(latents, dim=1) if distance == "cosine" else latents
    expected = torch.cdist(given, quantiser.book.embed[0]).argmin(1)
    assert torch.equal(found.codes, expected)
    torch.testing.assert_close(found.latents, quantiser.look_up(expected))
    torch.testing.assert_close(found.commitment, (given - quantiser.look_up(expected)).square().mean(1))
    found.latents.sum().backward()
    assert latents.grad is not None
    if distance == "euclidean":
        torch.testing.assert_close(latents.grad, torch.ones_like(latents))


def test_a_codebook_follows_the_mean_of_its_latents() -> None:
    """In the limit of the moving average every code is the mean of the latents nearest to it, as in k-means."""
    quantiser = VectorQuantiser(codes=2, width=2, distance="euclidean", decay=0.5, restart_below=0.0).train()
    quantiser.book.embed[0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    latents = torch.tensor([[2.0, 1.0], [4.0, 3.0], [-3.0, 0.0], [-5.0, 2.0], [-4.0, -2.0]])
    for _ in range(60):
        quantiser(latents, draws(latents))
        quantiser.learn(finite=True)
    torch.testing.assert_close(quantiser.book.embed[0], torch.tensor([[3.0, 2.0], [-4.0, 0.0]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantiser.book.cluster_size[0], torch.tensor([2.0, 3.0]))


def learnt(parts: Sequence[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    quantiser = VectorQuantiser(codes=40, width=3, decay=0.5, restart_below=0.5).train()
    chances = draws(torch.cat(list(parts))).split([len(part) for part in parts])
    for part, chance in zip(parts, chances, strict=True):
        quantiser(part, chance)
    quantiser.learn(finite=True)
    return {name: tensor.clone() for name, tensor in quantiser.state_dict().items()}


def test_a_codebook_learns_the_same_from_any_micro_batches() -> None:
    latents = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    whole = learnt([latents])
    parts = learnt(latents.split([20, 50, 20]))
    torch.manual_seed(1)
    before = VectorQuantiser(codes=40, width=3).state_dict()
    assert not torch.allclose(whole["nearest._codebook.embed"], before["nearest._codebook.embed"], atol=0.1)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)


def test_a_step_without_an_update_teaches_a_codebook_nothing() -> None:
    latents = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    quantiser = VectorQuantiser(codes=40, width=3).train()
    before = {name: tensor.clone() for name, tensor in quantiser.state_dict().items()}
    quantiser(latents, draws(latents))
    quantiser.learn(finite=False)
    quantiser.learn(finite=True)  # what was forgotten stays so
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantiser.state_dict().items())


def test_validation_teaches_a_codebook_nothing() -> None:
    quantiser = VectorQuantiser(codes=40, width=3).eval()
    before = quantiser.book.embed.clone()
    quantiser(torch.randn(90, 3), draws(torch.zeros(90)))
    quantiser.learn(finite=True)
    assert torch.equal(quantiser.book.embed, before)


def test_codes_that_nothing_uses_restart_where_latents_are_far_from_all() -> None:
    """All codes are near one cluster; the latents of the other are 1 % and get nearly all the restarts."""
    quantiser = VectorQuantiser(codes=16, width=2, distance="euclidean", restart_below=0.5).train()
    generator = torch.Generator().manual_seed(0)
    quantiser.book.embed[0] = torch.tensor([10.0, 0.0]) + 0.01 * torch.randn(16, 2, generator=generator)
    quantiser.book.embed[0, 1:] += 50.0  # only the first code is near the first cluster
    latents = torch.tensor([10.0, 0.0]) + 0.1 * torch.randn(990, 2, generator=generator)
    far = torch.tensor([0.0, 10.0]) + 0.1 * torch.randn(10, 2, generator=generator)
    latents = torch.cat([latents, far])
    for _ in range(80):
        quantiser(latents, draws(latents))
        quantiser.learn(finite=True)
    assert quantiser.eval()(latents).commitment.mean() < 0.01
    assert len(quantiser(latents).codes.unique()) == 16


def test_a_latent_is_drawn_in_proportion_to_its_squared_distance() -> None:
    quantiser = VectorQuantiser(codes=1, width=1, distance="euclidean").train()
    quantiser.book.embed[0, 0] = 0.0
    latents = torch.tensor([[1.0], [2.0], [0.0]])
    first = []
    for seed in range(2000):
        quantiser(latents, draws(latents, seed))
        assert quantiser._step is not None
        first.append(float(quantiser._step.chosen[0]))
        quantiser._step = None
    assert first.count(2.0) / 2000 == pytest.approx(0.8, abs=0.04)  # 4 / (4 + 1)
    assert first.count(0.0) == 0


# ------------------------------------------------------------------------------------------------ what is trained


def test_psnr_is_that_of_its_definition() -> None:
    target, other = noise(3), noise(3, seed=1)
    other[1] = target[1]
    expected = 10 * np.log10(255**2 / np.mean((target.numpy() / 1.0 - other.numpy()) ** 2, axis=(1, 2, 3)).clip(1e-5))
    expected[1] = 100
    assert psnr(target, other).tolist() == pytest.approx(expected.tolist())


def judged() -> JudgedAutoencoder:
    torch.manual_seed(3)
    discriminator = {"_target_": "mm.model.autoencoder.PatchDiscriminator", "width": 8}
    return build_autoencoder(AutoencoderOptions(options(), PERCEPTUAL, discriminator)).train()


@pytest.fixture(scope="module")
def image_recipe(corpus: dict[str, Path], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with both judges on pictures with and without words, 16 pictures a step in four packs."""
    folder = tmp_path_factory.mktemp("image")
    discriminator = {"_target_": "mm.model.autoencoder.PatchDiscriminator", "width": 8, "layers": 2}
    tokenizer = options() | {"quantiser": QUANTISERS["cosine"] | {"restart_below": 0.3, "decay": 0.8}}
    path = write_recipe(
        folder,
        corpus,
        tokenizer_folder,
        sources=("pairs", "pages"),
        steps=6,
        model={"autoencoder": {"tokenizer": tokenizer, "perceptual": PERCEPTUAL, "discriminator": discriminator}},
        objective={
            "_target_": "mm.objectives.reconstruction.Reconstruction",
            "squared": 0.5,
            "perceptual": 0.1,
            "adversarial": 0.1,
        },
        packing={"capacity": 96, "batch": 4, "window": 8},
        save_every=1,
        validate_every=3,
    )
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("tokenizer:", "  path:"))]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(image_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(image_recipe, f"run={tmp_path_factory.mktemp('one')}")


def batch_of(recipe: Path, *packs: int) -> Batch:
    return planned(Recipe.load(recipe)).materialiser()[MicroStep(0, packs)]


def test_a_document_is_its_pictures_and_nothing_else(image_recipe: Path) -> None:
    batch = batch_of(image_recipe, 0, 1, 2, 3)
    media = batch.media[Modality.IMAGE]
    assert batch.real_tokens == 24 * len(media.grids) == len(media.slots)
    assert len(media.grids) > len(batch.rows)  # a page has three


def test_each_side_of_the_adversarial_loss_trains_its_own_network(image_recipe: Path) -> None:
    model, batch = judged(), batch_of(image_recipe, 0)
    found = model(batch)
    discriminator = [model.judges["discriminator"].parameters(), model.tokenizer.parameters()]
    (found.logits.real.sum() + found.logits.fake.sum()).backward(retain_graph=True)
    assert [any_gradient(parameters) for parameters in discriminator] == [True, False]
    model.zero_grad()
    found.logits.fooled.sum().backward()
    discriminator = [model.judges["discriminator"].parameters(), model.tokenizer.parameters()]
    assert [any_gradient(parameters) for parameters in discriminator] == [False, True]
    torch.testing.assert_close(found.logits.fooled, found.logits.fake)


def any_gradient(parameters: Any) -> bool:
    return any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_the_perceptual_encoder_stays_as_it_is_and_passes_gradients_on(image_recipe: Path) -> None:
    model, batch = judged(), batch_of(image_recipe, 0)
    statistics = {name: tensor.clone() for name, tensor in model.judges["perceptual"].named_buffers()}
    model(batch).perceptual.sum().backward()
    assert any_gradient(model.tokenizer.parameters())
    assert not any(parameter.requires_grad for parameter in model.judges["perceptual"].parameters())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in model.judges["perceptual"].named_buffers())
    pixels = torch.rand(2, 3, 16, 24)
    assert model.judges["perceptual"](pixels, pixels).tolist() == [0.0, 0.0]


def test_a_batch_without_pictures_runs_everything_and_changes_nothing(image_recipe: Path) -> None:
    model, objective = judged(), Reconstruction(perceptual=0.1, adversarial=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = batch_of(image_recipe, -1)
    share, parts = objective.loss(model, batch, {objective.name: 7.0}, ["pairs", "pages"])
    share.backward()
    model.tokenizer.quantiser.learn(finite=True)
    assert parts.keys() == set(objective.losses(["pairs", "pages"]))
    assert all(float(value) == 0 for pair in parts.values() for value in pair)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_losses_of_the_batches_add_up_to_the_loss_of_all(image_recipe: Path) -> None:
    model, objective = judged().eval(), Reconstruction(perceptual=0.1, adversarial=0.1, squared=0.5)
    batches = [batch_of(image_recipe, 0, 1, 2), batch_of(image_recipe, 0), batch_of(image_recipe, 1, -1, 2)]
    denominators = [objective.weights(batches[:1]), objective.weights(batches[1:])]
    assert denominators[0] == denominators[1]
    whole, parts = objective.loss(model, batches[0], denominators[0], ["pairs", "pages"])
    halves = [objective.loss(model, batch, denominators[0], ["pairs", "pages"]) for batch in batches[1:]]
    assert whole.item() == pytest.approx(sum(share.item() for share, _ in halves), rel=1e-5)
    for name, pair in parts.items():
        added = [sum(float(half[name][place]) for _, half in halves) for place in range(2)]
        assert [float(value) for value in pair] == pytest.approx(added, rel=1e-4), name
    terms = {"absolute": 1.0, "squared": 0.5, "perceptual": 0.1, "commitment": 0.25, "generator": 0.1}
    weighted = sum(weight * float(parts[f"part/{name}"][0]) for name, weight in terms.items())
    assert float(parts["total"][0]) == pytest.approx(weighted, rel=1e-5)
    assert float(parts["total"][1]) == denominators[0]["reconstruction"]
    by_source = [float(parts[f"source/{name}"][0]) for name in ("pairs", "pages")]
    assert sum(by_source) == pytest.approx(float(parts["total"][0]), rel=1e-5)
    assert float(parts["source/pages"][1]) % 3 == 0


def test_validation_tells_psnr_and_the_use_of_codes(image_recipe: Path, run: Path) -> None:
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [report for report in reports if "validation_loss" in report]
    assert [report["step"] for report in validated] == [3, 6]
    tokenizer = TrainedTokenizer.load(str(run))
    recipe = Recipe.load(image_recipe, ["steps=null", "epochs=1"])
    recipe.data.sources = recipe.data.validation
    data = planned(recipe)
    batch = data.materialiser()[MicroStep(0, tuple(range(data.plan.total_packs() or 0)))]
    target = batch.media[Modality.IMAGE].inputs["pixels"]
    assert len(target) == 15
    codes = tokenizer.encode(target)
    given_back = torch.stack(tokenizer.decode(codes, [GRID] * 15))
    shares = torch.bincount(codes, minlength=12) / len(codes)
    assert validated[-1]["validation/psnr"] == pytest.approx(float(psnr(target, given_back).mean()), rel=1e-4)
    assert validated[-1]["validation/utilisation"] == pytest.approx(float((shares > 0).float().mean()), abs=0.01)
    perplexity = math.exp(-sum(share * math.log(share) for share in shares.tolist() if share))
    assert validated[-1]["validation/perplexity"] == pytest.approx(perplexity, rel=0.02)
    strip = np.array(PillowImage.open(run / "pictures" / "step-00000006.png"))
    assert strip.shape[0] == 2 * (16 + 2)
    assert any(np.array_equal(strip[:16, :24], picture) for picture in target.numpy())


def test_a_report_shows_the_reconstructions_and_what_was_trained(run: Path) -> None:
    page = report_of_run(run)
    assert page.count("data:image/png;base64,") == 2  # of the first validation and of the last
    assert "ImageAutoencoder" in page
    assert "language model" not in page
    assert "PSNR" in page


# --------------------------------------------------------------------------------------- processes, resuming, stages


def state(run: Path) -> dict[str, Tensor]:
    """Weights and buffers of the last checkpoint."""
    path = checkpoint.find(run)
    model = build_trainable(Recipe.load(run / "recipe.yaml").model)
    checkpoint.load_weights(path, model)
    return dict(model.state_dict())


@pytest.mark.parametrize("quantiser", ["cosine", "scalar"])
def test_two_processes_train_a_tokenizer_as_one_does(
    image_recipe: Path, run: Path, tmp_path: Path, quantiser: str
) -> None:
    """Weights, moving averages, restarts of codes and figures; with BatchNorm in a judge and discriminator."""
    change: list[str] = []
    if quantiser != "cosine":
        change = [f"model.autoencoder.tokenizer.quantiser={json.dumps(QUANTISERS[quantiser])}"]
        run = train_here(image_recipe, f"run={tmp_path / 'one'}", *change)
    train_together(tmp_path, 2, [[str(image_recipe), f"run={tmp_path / 'two'}", *change]])
    for figure in ("loss", "validation_loss", "validation/psnr", "validation/perplexity", "loss/part/discriminator"):
        assert losses(tmp_path / "two", figure) == pytest.approx(losses(run, figure), rel=2e-4), figure
    # before AdamW has amplified rounding
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(run)[1], rel=1e-6)
    one, two = state(run), state(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-4, msg=name)
    if quantiser == "cosine":
        torch.manual_seed(Recipe.load(image_recipe).seed)
        fresh = build_trainable(Recipe.load(image_recipe).model).state_dict()
        name = "tokenizer.quantiser.nearest._codebook.embed"
        assert not torch.allclose(one[name], fresh[name], atol=0.1)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(image_recipe: Path, run: Path, tmp_path: Path) -> None:
    resumed = fork_run(run, tmp_path / "resumed", step=3)
    torch.manual_seed(99)
    train_here(image_recipe, f"run={resumed}")
    assert losses(resumed) == losses(run)
    expected = state(run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())
    assert expected["updates"] == 6


def test_levels_that_keep_only_their_input_train_alike(image_recipe: Path, run: Path, tmp_path: Path) -> None:
    folder = train_here(image_recipe, f"run={tmp_path}", "steps=3", "parallel.activations=full")
    expected = losses(run)
    assert losses(folder) == {step: expected[step] for step in (1, 2, 3)}


def test_checkpoints_hold_the_moving_averages(run: Path) -> None:
    names = dcp.FileSystemReader(checkpoint.find(run)).read_metadata().state_dict_metadata
    for part in ("embed", "embed_avg", "cluster_size"):
        assert f"model.tokenizer.quantiser.nearest._codebook.{part}" in names


def test_a_later_stage_may_begin_to_ask_the_discriminator(image_recipe: Path, tmp_path: Path) -> None:
    stages = "[{steps: 2, objective: {adversarial: 0}}, {steps: 2}]"
    folder = train_here(image_recipe, f"run={tmp_path}", "steps=null", f"stages={stages}")
    asked = losses(folder, "loss/part/discriminator")
    assert sorted(asked) == [3, 4]
    assert sorted(losses(folder)) == [1, 2, 3, 4]


def test_a_model_on_the_meta_device_has_the_shapes_of_a_real_one() -> None:
    for quantiser in QUANTISERS:
        spec = ModelOptions(autoencoder=AutoencoderOptions(options(quantiser), PERCEPTUAL))
        real, meta = build_trainable(spec), build_trainable(spec, meta=True)
        assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
        assert all(parameter.is_meta for parameter in meta.parameters())
        assert meta.entrances.keys() == real.entrances.keys()
        assert meta.media_flops(Modality.IMAGE, GRID) == real.media_flops(Modality.IMAGE, GRID) > 0


# ------------------------------------------------------------------------------------------------------ using one


def test_an_export_gives_the_codes_and_the_fingerprint_of_its_run(run: Path, tmp_path: Path) -> None:
    pixels = noise(3, seed=5)
    tokenizer = TrainedTokenizer.load(str(run))
    exported = TrainedTokenizer.load(str(export_run(run, tmp_path)))
    earlier = TrainedTokenizer.load(str(run / "checkpoints" / "step-00000003"))
    assert torch.equal(tokenizer.encode(pixels), exported.encode(pixels))
    assert tokenizer.fingerprint == exported.fingerprint
    assert tokenizer.fingerprint != earlier.fingerprint
    assert not any(name.startswith("judges") for name in tokenizer.state_dict())
    with torch.device("meta"):
        assert TrainedTokenizer.load(str(run)).fingerprint == tokenizer.fingerprint


def test_a_run_that_trained_a_language_model_is_no_tokenizer(one: Path) -> None:
    with pytest.raises(RecipeError, match="has trained a language model"):
        TrainedTokenizer.load(str(one))


def test_presets_of_tokenizers_of_pictures_name_classes_that_there_are() -> None:
    assert "tokenizers" in PRESET_FOLDERS
    specs = [resolve(preset.path) for preset in presets()["tokenizers"]]
    media = [spec for spec in specs if "_target_" in spec]
    assert len(media) >= 3
    for spec in media:
        with pytest.raises(RecipeError, match="unknown option `no_such_option`"):
            build(spec | {"no_such_option": 1}, MediaTokenizer)


@pytest.mark.parametrize(
    ("preset", "grid", "codes", "millions"),
    [("train/image-tokenizer-64.yaml", (8, 8), 512, 0.9), ("train/image-tokenizer.yaml", (16, 16), 8192, 64.2)],
)
def test_presets_train_tokenizers_of_the_sizes_that_they_name(
    preset: str, grid: tuple[int, int], codes: int, millions: float
) -> None:
    for recipe in Recipe.load(preset).stage_recipes():
        model = build_trainable(recipe.model, meta=True)
        assert isinstance(model, JudgedAutoencoder)
        processor = build_processor(recipe.model, model, recipe.text_tokenizer())
        build(recipe.objective, Objective).prepare(model, processor, torch.device("cpu"))
        assert (model.tokenizer.transform.features, model.tokenizer.codes) == (grid, codes)
        size = sum(parameter.numel() for parameter in model.tokenizer.parameters())
        assert size / 1e6 == pytest.approx(millions, abs=0.05)
        assert recipe.packing.capacity % math.prod(grid) == 0


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective={_target_: mm.objectives.next_token.NextToken}"], "next_token predicts tokens"),
        (
            ["model.autoencoder.discriminator=null"],
            "adversarial is 0.1 and there is no",
        ),
        (["model.autoencoder.perceptual=null"], "perceptual is 0.1 and there is no model.autoencoder.perceptual"),
        (
            ["model.encoders.image={_target_: mm.encoders.vision.TimmEncoder}"],
            "remove decoder, encoders",
        ),
        (["warm_start={packs: 1}"], "warm_start sets adapters"),
        (["model.autoencoder.tokenizer.quantiser={_target_: mm.tokenizers.quantise.Quantiser}"], "cannot be built"),
        (["model.autoencoder=null"], "`tokenizer` is missing: a language model needs"),
    ],
)
def test_recipes_that_cannot_train_a_tokenizer_say_why(
    image_recipe: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises((RecipeError, RunError), match=message):
        train_here(image_recipe, f"run={tmp_path}", *changes)


def test_an_engine_that_would_round_the_codebook_is_refused(image_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="an autoencoder trains with FSDP2 and context 1"):
        train_here(image_recipe, f"run={tmp_path}", "parallel.engine=deepspeed")


def test_reconstruction_of_a_language_model_is_refused(recipe: Path, tmp_path: Path) -> None:
    objective = "objective={_target_: mm.objectives.reconstruction.Reconstruction}"
    with pytest.raises(RecipeError, match="trains an autoencoder and the recipe has a language model"):
        train_here(recipe, f"run={tmp_path}", objective)


def test_a_discriminator_judges_a_picture_alone() -> None:
    judge = PatchDiscriminator(8, 3).train()
    pixels = torch.rand(3, 3, 16, 24) * 2 - 1
    torch.testing.assert_close(judge(pixels), torch.cat([judge(one) for one in pixels.split(1)]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in judge.modules())
