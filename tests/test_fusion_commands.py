"""The commands that generate, with a run that reads and writes pictures as codes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from typer.testing import CliRunner, Result

from mm.cli import app
from mm.configure import RecipeError
from mm.model.decoder import NotCausal
from mm.report.pictures import contact_sheet
from mm.report.samples import PICTURES, held_out
from mm.train.recipe import Recipe
from tests.small_world import DECODER, train_here, write_recipe
from tests.test_early_fusion import fusion_recipe, run_tokenize, scene

EXPERTS = {"groups": {"text": 2, "image": 2}}


def fused(folder: Path, tokenizer: Path, **decoder: object) -> Path:
    """A run of a few steps; the decoder as asked for."""
    model = {
        "decoder": {"config": DECODER | {"vocabulary": 259 + 2 + 64, **decoder}},
        "tokenizers": {"image": {"_target_": "tests.patch_colours.PatchColours"}},
    }
    recipe = fusion_recipe(folder, tokenizer, model=model, steps=3)
    run_tokenize(recipe)
    return train_here(recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Its experts are causal."""
    experts = {**EXPERTS, "router": "token_choice"}
    return fused(tmp_path_factory.mktemp("fused"), tokenizer_folder, experts=experts)


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Its experts choose among all tokens of a pack."""
    return fused(tmp_path_factory.mktemp("choosing"), tokenizer_folder, experts=EXPERTS)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_pictures_of_a_prompt_are_written_with_a_sheet(run: Path, tmp_path: Path) -> None:
    command = ["generate", run, "--prompt", "red over blue", "--pictures", 3, "--size", 24, "--guidance", 2]
    result = call(*command, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "holds 3 pictures and sheet.png" in result.output.replace("\n", "")
    one = {path.name: np.array(PillowImage.open(path)) for path in (tmp_path / "one").iterdir()}
    assert {name: pixels.shape for name, pixels in one.items()} == {
        **{f"00{number}.png": (24, 24, 3) for number in range(3)},
        "sheet.png": (2 * 28 + 4, 2 * 28 + 4, 3),
    }
    assert not np.array_equal(one["000.png"], one["001.png"])
    call(*command, "--out", tmp_path / "again")
    assert np.array_equal(np.array(PillowImage.open(tmp_path / "again" / "sheet.png")), one["sheet.png"])
    call(*command, "--out", tmp_path / "other", "--seed", 1)
    assert not np.array_equal(np.array(PillowImage.open(tmp_path / "other" / "sheet.png")), one["sheet.png"])


def test_a_picture_is_described(run: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(scene(1)[0])
    result = call("generate", run, "--image", tmp_path / "picture.png", "--max-tokens", 5)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --prompt, --image or both; or --pictures"),
        (["--image", "a.png", "--pictures", "2"], "drawn from words alone"),
        (["--prompt", "a", "--device", "cuda"], "--device cuda cannot be used here"),
        (["--prompt", "a", "--device", "gpu"], "--device gpu cannot be used here"),
    ],
)
def test_what_cannot_be_asked_for_is_said(run: Path, options: list[str], said: str) -> None:
    result = call("generate", run, *options)
    assert isinstance(result.exception, RecipeError)
    assert said in str(result.exception)


def test_a_run_whose_pictures_enter_through_an_encoder_neither_draws_nor_shows_samples(
    tmp_path: Path, corpus: dict[str, Path], tokenizer_folder: Path
) -> None:
    seeing = train_here(write_recipe(tmp_path, corpus, tokenizer_folder, ["pairs"], steps=1))
    for command in (["generate", seeing, "--prompt", "a", "--pictures", 1], ["report", seeing, "x", "--samples", 1]):
        result = call(*command)
        assert isinstance(result.exception, RecipeError)
        assert "no image tokenizer" in str(result.exception)


def test_a_decoder_that_is_not_causal_says_what_to_do(choosing: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(scene(1)[0])
    for command in (
        ["generate", choosing, "--prompt", "a", "--pictures", 1],
        ["generate", choosing, "--image", tmp_path / "picture.png"],
        ["report", choosing, tmp_path / "report.html", "--samples", 1],
    ):
        result = call(*command)
        assert isinstance(result.exception, NotCausal)
        assert "train auxiliary routers" in str(result.exception)


def test_the_report_shows_held_out_samples_where_they_are_asked_for(run: Path, tmp_path: Path) -> None:
    pages = []
    for number, options in enumerate([[], ["--samples", 4]]):
        path = tmp_path / f"{number}.html"
        result = call("report", run, path, *options)
        assert result.exit_code == 0, result.output
        pages.append(path.read_text())
    plain, sampled = pages
    assert "What it draws and says" not in plain
    section = sampled.split("What it draws and says")[1].split("<h2>Training</h2>")[0]
    captions = [caption for _, (_, caption) in zip(range(4), held_out(Recipe.load(run / "recipe.yaml")), strict=False)]
    assert re.findall(r"<div>(.+?)</div>", section) == captions
    assert section.count("data:image/png") == 4 * (2 + PICTURES)
    assert section.count('class="said"') == 4


def test_held_out_samples_are_pictures_with_words_each_once(run: Path) -> None:
    found = list(held_out(Recipe.load(run / "recipe.yaml")))
    assert sorted(caption for _, caption in found) == sorted(scene(row)[1] for row in range(6))
    assert {image.data for image, _ in found} == {scene(row)[0] for row in range(6)}


def test_held_out_samples_are_those_that_the_run_validates_on(run: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(run / "recipe.yaml")
    (source,) = recipe.data.validation.values()
    shortest = min((scene(row)[1] for row in range(6)), key=len)
    chosen = replace(source, where=f"characters <= {len(shortest)}")
    data = replace(recipe.data, validation={"chosen": chosen})
    found = {caption for _, caption in held_out(replace(recipe, data=data))}
    assert found == {scene(row)[1] for row in range(6) if len(scene(row)[1]) == len(shortest)}


def test_a_sheet_holds_every_picture_once_whatever_their_sizes() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (99, 9, 9)]
    sizes = [(4, 6), (8, 3), (5, 5), (8, 8), (1, 1)]
    sheet = contact_sheet([PillowImage.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)])
    found = {colour: count for count, colour in sheet.getcolors() or []}
    del found[(255, 255, 255)]  # type: ignore[arg-type]
    assert found == {colour: width * height for colour, (width, height) in zip(colours, sizes, strict=True)}
