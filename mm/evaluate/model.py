"""A trained model answers questions, with prompts rendered as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch

from mm.configure import RecipeError
from mm.evaluate.answerer import Prompt, Scored, ScoredQuestion
from mm.model.generate import Passage, generate, passages, score_continuations
from mm.model.grammar import Grammar
from mm.model.multimodal import MultimodalLM
from mm.packing.collate import Processor
from mm.sample import Image, Modality, Part, Role, Sample, Text
from mm.tokenizers.base import MediaTokenizer
from mm.tokenizers.text import Piece

QUESTIONS_AT_ONCE = 32

T = TypeVar("T")


class ModelAnswerer:
    """The `Answerer` of a model in one process.

    A question with words is put as a chat: picture and words from the user, the option from the assistant. One without
    is a document of the pre-training kind: the picture, then the option. Either way an option's tokens are exactly
    those that would bear loss in training, its end token included.
    """

    def __init__(
        self,
        model: MultimodalLM,
        processor: Processor,
        tokenizers: Mapping[Modality, MediaTokenizer] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            tokenizers: with their weights, of the modalities that the model reads as codes; see `build_tokenizers`.

        Raises:
            RecipeError: one is missing.
        """
        tokenizers = tokenizers or {}
        for modality in processor.spellings.keys() - tokenizers.keys():
            raise RecipeError(f"the model reads {modality.label} as codes; give the tokenizer that makes them")
        self.model = model.to(device).eval()
        self.model.decoder.attention_backend = "auto"  # the recipe's is for the device and dtype of training
        self.processor = processor
        self.tokenizers = {modality: tokenizer.to(device).eval() for modality, tokenizer in tokenizers.items()}
        self.device = torch.device(device)

    @torch.inference_mode()
    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        """Log-probability of every option; the prefix is computed once for all options of a question."""
        scores: list[list[Scored]] = []
        for chosen in _chunks(questions):
            prefixes = self._prefixes([(question.picture, question.prompt) for question in chosen])
            options = [
                [self._option(prefix, option) for option in question.options]
                for prefix, question in zip(prefixes, chosen, strict=True)
            ]
            trunks = self._passages(prefixes)
            found = score_continuations(self.model.decoder, self.processor.vocabulary, trunks, options)
            scores += [[Scored(option.logprob, option.tokens) for option in row] for row in found]
        return scores

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Greedy answers."""
        text, grammar = self.processor.text, Grammar(self.processor.vocabulary)
        answers: list[str] = []
        for chosen in _chunks(prompts):
            read = self._passages(self._prefixes([(prompt.picture, prompt.text) for prompt in chosen]))
            for ids in generate(self.model.decoder, grammar, read, max_tokens, stop=text.stop):
                answers.append(text.decode(ids).strip())
        return answers

    def _prefixes(self, asked: Sequence[tuple[bytes | None, str]]) -> list[tuple[Part, ...]]:
        """What stands before the answers to pictures and words. Each picture is encoded once."""
        pictures = list(dict.fromkeys(picture for picture, _ in asked if picture is not None))
        parts = dict(zip(pictures, self._entering([Image(picture) for picture in pictures]), strict=True))
        return [_prefix(None if picture is None else parts[picture], words) for picture, words in asked]

    def _entering(self, images: Sequence[Image]) -> Sequence[Part]:
        """Pictures as the model reads them: as files, or as codes."""
        if Modality.IMAGE in self.processor.spellings:
            return self.tokenizers[Modality.IMAGE].read(images)
        return images

    def _passages(self, prefixes: Sequence[tuple[Part, ...]]) -> list[Passage]:
        """Each prefix as the decoder reads it."""
        text = self.processor.text
        beginning = [Piece(text.begin or (text.end,), loss=False)]  # of a document that has nothing before its words
        documents = [self.processor.assemble(text.render_prompt(parts) if parts else beginning) for parts in prefixes]
        batch = self.processor.collate([documents], [[(0, 0, 0)] * len(documents)]).to(self.device)
        return passages(self.model, batch)

    def _option(self, prefix: tuple[Part, ...], option: str) -> list[int]:
        """The option's tokens as training renders them."""
        role: Role | None = "assistant" if prefix and prefix[-1].role else None
        pieces = self.processor.text.render(Sample("evaluation", "", (*prefix, Text(option, loss=True, role=role))))
        return list(chain.from_iterable(piece.ids for piece in pieces if piece.loss and piece.part is None))


def _prefix(picture: Part | None, words: str) -> tuple[Part, ...]:
    role: Role | None = "user" if words else None
    parts: list[Part] = [] if picture is None else [replace(picture, role=role)]
    if words:
        parts.append(Text(words, loss=False, role=role))
    return tuple(parts)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), QUESTIONS_AT_ONCE):
        yield items[start : start + QUESTIONS_AT_ONCE]
