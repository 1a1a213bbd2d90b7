"""A trained model answers questions, with prompts rendered as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from mm.evaluate.answerer import Prompt, Scored, ScoredQuestion
from mm.model.generate import generate, score_continuations
from mm.model.multimodal import MultimodalLM
from mm.packing.collate import Processor
from mm.sample import Image, Part, Role, Sample, Text
from mm.tokenizers.text import Piece

QUESTIONS_AT_ONCE = 32

T = TypeVar("T")


class ModelAnswerer:
    """The `Answerer` of a model in one process.

    A question with words is put as a chat: picture and words from the user, the option from the assistant. One without
    is a document of the pre-training kind: the picture, then the option. Either way an option's tokens are exactly
    those that would bear loss in training, its end token included.
    """

    def __init__(self, model: MultimodalLM, processor: Processor, device: torch.device | str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.processor = processor
        self.device = torch.device(device)

    @torch.inference_mode()
    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        """Log-probability of every option; the prefix is computed once for all options of a question."""
        scores: list[list[Scored]] = []
        for chosen in _chunks(questions):
            parts = [_parts(question.picture, question.prompt) for question in chosen]
            options = [
                [self._option(prefix, option) for option in question.options]
                for prefix, question in zip(parts, chosen, strict=True)
            ]
            found = score_continuations(self.model.decoder, self._trunks(parts), options)
            scores += [[Scored(option.logprob, option.tokens) for option in row] for row in found]
        return scores

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Greedy answers."""
        answers: list[str] = []
        for chosen in _chunks(prompts):
            trunks = self._trunks([_parts(prompt.picture, prompt.text) for prompt in chosen])
            for ids in generate(self.model.decoder, trunks, max_tokens, stop=self.processor.text.stop):
                answers.append(self.processor.text.decode(ids).strip())
        return answers

    def _trunks(self, prefixes: Sequence[tuple[Part, ...]]) -> list[Tensor]:
        """(P_i, D) embeddings of each prefix."""
        text = self.processor.text
        beginning = [Piece(text.begin or (text.end,), loss=False)]  # of a document that has nothing before its words
        documents = [self.processor.assemble(text.render_prompt(parts) if parts else beginning) for parts in prefixes]
        batch = self.processor.collate([documents], [[(0, 0, 0)] * len(documents)]).to(self.device)
        return list(self.model.embed(batch).split(batch.offsets.diff().tolist()))

    def _option(self, prefix: tuple[Part, ...], option: str) -> list[int]:
        """The option's tokens as training renders them."""
        role: Role | None = "assistant" if prefix and prefix[-1].role else None
        pieces = self.processor.text.render(Sample("evaluation", "", (*prefix, Text(option, loss=True, role=role))))
        return list(chain.from_iterable(piece.ids for piece in pieces if piece.loss and piece.part is None))


def _parts(picture: bytes | None, words: str) -> tuple[Part, ...]:
    role: Role | None = "user" if words else None
    parts: list[Part] = [Image(picture, role=role)] if picture is not None else []
    if words:
        parts.append(Text(words, loss=False, role=role))
    return tuple(parts)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), QUESTIONS_AT_ONCE):
        yield items[start : start + QUESTIONS_AT_ONCE]
