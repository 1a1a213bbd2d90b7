"""Pictures that a model draws: behind words it goes on with the codes of a picture, and the tokenizer decodes them.

words ─as in training─▶ … words begin ─generate, guided─▶ code × L ─MediaTokenizer.decode─▶ (rows, columns, 3)
                        begin ────────────────┘ the same picture without the words
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm.configure import RecipeError
from mm.media import ImageFacts
from mm.model.generate import Guidance, Passage, generate
from mm.model.grammar import Grammar
from mm.model.multimodal import MultimodalLM
from mm.model.sampling import Sampling
from mm.packing.collate import Processor
from mm.sample import Codes, Modality, Part, Text
from mm.tokenizers.base import MediaTokenizer


@torch.inference_mode()
def generate_images(
    model: MultimodalLM,
    processor: Processor,
    tokenizers: Mapping[Modality, MediaTokenizer],
    prompts: Sequence[str],
    *,
    guidance: float = 1.0,
    sampling: Sampling | None = None,
    size: ImageFacts = ImageFacts(256, 256),  # noqa: B008  (a tuple: nothing can be changed in it)
) -> list[Tensor]:
    """A picture for each prompt, (rows, columns, 3) uint8, as behind these words in a caption's document.

    Args:
        model: with a causal decoder that reads pictures as codes.
        processor: of the model's recipe.
        tokenizers: of the model's recipe, with their weights, where the model is; see `build_tokenizers`.
        prompts: an empty one gives a picture without a caption.
        guidance: see `mm.model.generate.Guidance`; what is left out of the unconditional document are the words.
        sampling: how codes are taken; drawn at temperature 1 if not given.
        size: of the pictures, where the tokenizer takes more than one.

    Raises:
        RecipeError: the model does not write pictures as codes.
        NotCausal: the decoder cannot go token by token.
    """
    if Modality.IMAGE not in processor.spellings:
        raise RecipeError(
            "the model cannot draw: its recipe has no image tokenizer (model.tokenizers.image). Pictures that enter "
            "through an encoder are read only; docs/early-fusion.md has recipes for codes"
        )
    sampling = sampling or Sampling(temperature=1.0)
    tokenizer = tokenizers[Modality.IMAGE]
    grid = tokenizer.transform.grid(size)
    codes = _codes(model, processor, prompts, math.prod(grid), guidance, sampling)
    if not codes:
        return []
    flat = torch.tensor(codes, device=model.decoder.head_weight.device).flatten()
    return [picture.cpu() for picture in tokenizer.decode(flat, [grid] * len(codes))]


def _codes(
    model: MultimodalLM,
    processor: Processor,
    prompts: Sequence[str],
    length: int,
    guidance: float,
    sampling: Sampling,
) -> list[list[int]]:
    """The codes of a picture for each prompt."""
    decoder, vocabulary = model.decoder, processor.vocabulary
    codebook = vocabulary.codebooks[Modality.IMAGE]
    grammar = Grammar(vocabulary, {Modality.IMAGE: length})

    def opening(words: str) -> Passage:
        return Passage.of(decoder, vocabulary, opening_of(processor, words, length))

    guide = None
    if guidance != 1.0:
        guide = Guidance([opening("")] * len(prompts), guidance)
    found = generate(decoder, grammar, [opening(words) for words in prompts], length, (), sampling, guide)
    return [[token - codebook.first for token in ids] for ids in found]


def opening_of(processor: Processor, words: str, length: int) -> list[int]:
    """Ids of a document of words, then a picture of so many codes, up to where its first code stands."""
    picture = Codes(Modality.IMAGE, (0,) * length)
    parts: tuple[Part, ...] = (Text(words, loss=False), picture) if words else (picture,)
    document = processor.assemble(processor.text.render_prompt(parts))
    return document.tokens[: document.items[0].start + 1].tolist()
