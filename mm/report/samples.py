"""What a model that reads and writes pictures as codes makes of held-out samples.

validation ─▶ picture, caption ─┬─ picture ─codes─▶ said, decoded
                                └─ caption ─▶ drawn
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image as PillowImage
from torch import Tensor

from mm import configure, media
from mm.configure import RecipeError
from mm.data.card import Card
from mm.data.index import index_card
from mm.evaluate.answerer import Prompt
from mm.evaluate.model import ModelAnswerer
from mm.media import ImageFacts
from mm.model.images import generate_images
from mm.model.multimodal import build_tokenizers
from mm.model.sampling import Sampling
from mm.packing.hashing import shuffled
from mm.report.pictures import exact
from mm.sample import BrokenSample, Image, Modality, Text
from mm.train.export import load_trained
from mm.train.recipe import Recipe
from mm.train.sources import excluded_rows

GUIDANCE = 3.0
PICTURES = 2  # drawn of each caption
WORDS = 96  # most tokens of what is said
SIZE = 256  # pixels of the longer side


@dataclass(frozen=True)
class Drawn:
    """A held-out picture with its caption, and what the model makes of them; pictures are data URLs.

    decoded: the picture from its own codes
    pictures: drawn of the caption
    said: of the picture
    """

    picture: str
    caption: str
    decoded: str
    pictures: tuple[str, ...]
    said: str


@torch.inference_mode()
def samples_of_run(run: Path, count: int, device: torch.device | str = "cpu") -> list[Drawn]:
    """So many samples of the validation split, drawn by the run's seed, with what the newest checkpoint makes of them.

    Raises:
        RecipeError: the run reads no pictures as codes, or validates on no pictures with captions.
        NotCausal: its decoder cannot go token by token.
    """
    trained = load_trained(run)
    recipe, tokenizers = trained.recipe, build_tokenizers(trained.recipe.model)
    if Modality.IMAGE not in tokenizers:
        raise RecipeError(f"{run}: samples are of runs that read pictures as codes, and this has no image tokenizer")
    tokenizer = tokenizers[Modality.IMAGE]
    answerer = ModelAnswerer(trained.model, trained.processor, tokenizers, device)
    found = []
    for number, (image, caption) in zip(range(count), held_out(recipe), strict=False):
        facts = media.facts(image)
        assert isinstance(facts, ImageFacts)
        (codes,) = tokenizer.read([image])
        (decoded,) = tokenizer.decode(torch.tensor(codes.ids, device=device), [tokenizer.transform.grid(facts)])
        sampling = Sampling(1.0, seed=recipe.seed + number)
        prompts = [caption] * PICTURES
        drawn = generate_images(
            trained.model, trained.processor, tokenizers, prompts, guidance=GUIDANCE, sampling=sampling, size=facts
        )
        (said,) = answerer.generate([Prompt(image.data, "")], WORDS)
        found.append(Drawn(_shown(image), caption, _shown(decoded.cpu()), tuple(map(_shown, drawn)), said))
    if not found:
        raise RecipeError(f"{run}: samples need pictures with captions in data.validation, and there are none")
    return found


def held_out(recipe: Recipe) -> Iterator[tuple[Image, str]]:
    """Pictures with the words that come with them, of the validation sources, in an order of the recipe's seed."""
    folder = Path(recipe.data.index).expanduser() / "index"
    cache = recipe.data.cache.open() if recipe.data.cache else None
    for name, source in recipe.data.validation.items():
        card = replace(Card.load(configure.find_preset(source.card)), cache=cache)
        rows = index_card(card, source.split, folder)
        excluded, _ = excluded_rows(rows, source.where)
        for row in shuffled(rows.rows, recipe.seed, "samples", name).tolist():
            if excluded is not None and excluded[row]:
                continue
            try:
                parts = rows.sample(row).parts
                pictures = [part for part in parts if isinstance(part, Image)]
                for picture in pictures:
                    media.decode(picture)
            except BrokenSample:
                continue
            words = [part.text for part in parts if isinstance(part, Text)]
            if len(parts) == 2 and pictures and words:
                yield pictures[0], words[0]


def _shown(picture: Image | Tensor) -> str:
    shown = PillowImage.fromarray(picture.numpy()) if isinstance(picture, Tensor) else media.decode(picture)
    assert isinstance(shown, PillowImage.Image)
    return exact(shown, SIZE)
