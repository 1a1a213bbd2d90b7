"""What evaluation asks of a model: the likelihood of given options, or words of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScoredQuestion:
    """A prefix and the continuations to score after it. No picture: it is withheld.

    An empty prompt without a picture stands for the beginning of a document, as in training.
    """

    picture: bytes | None
    prompt: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """An option's natural-log probability, summed over its tokens (≥ 1), given picture and prompt."""

    logprob: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Picture (or none) and text that a model answers in its own words."""

    picture: bytes | None
    text: str


class Answerer(Protocol):
    """A model under evaluation.

    The evaluator hands over every (picture, prompt, option) once, questions of one picture next to each other, so an
    implementation can encode each picture once and share the prefix among its options. What it returns for a question
    must not depend on the other questions of the call.
    """

    def score(self, questions: Sequence[ScoredQuestion]) -> list[list[Scored]]:
        """One list a question, in order, with one `Scored` an option, in order."""
        ...

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Greedy continuations of at most `max_tokens` tokens, in order, without special tokens."""
        ...
