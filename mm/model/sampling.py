"""One token of each row of logits: the most probable, or one that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.layers.precision import wide

Draw = Callable[[Tensor, Sequence[int]], list[int]]
"""One token for each row of (B, V) logits; row i belongs to the sequence of the i-th number."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are taken.

    temperature: divides the logits before drawing; 0 takes the most probable token
    top_k: draw from so many of the most probable tokens; None: from all
    top_p: and from the fewest of them whose probabilities sum to at least this (Holtzman et al. 2020, section 3.1)
    seed: of the draws
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0, for the most probable token, or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it counts tokens to draw from and must be at least 1")

    def start(self, sequences: int) -> Draw:
        """Draws for so many sequences. Each has a random stream of its own, a function of the seed and its number."""
        return _most_probable if self.temperature == 0 else _Nucleus(self, sequences)


def _most_probable(logits: Tensor, sequences: Sequence[int]) -> list[int]:
    return logits.argmax(-1).tolist()


class _Nucleus:
    """Draws from the most probable tokens."""

    def __init__(self, sampling: Sampling, sequences: int) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(_hash(sampling.seed, number)) for number in range(sequences)]

    def __call__(self, logits: Tensor, sequences: Sequence[int]) -> list[int]:
        logits, tokens = wide(logits).cpu().sort(descending=True)
        probabilities = (logits[:, : self.sampling.top_k] / self.sampling.temperature).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0.0)
        probabilities[:, 0].clamp_(min=torch.finfo(torch.float32).tiny)  # top_p = 0 leaves the most probable one
        drawn = [
            torch.multinomial(row, 1, generator=self.generators[sequence])
            for row, sequence in zip(probabilities, sequences, strict=True)
        ]
        return tokens.gather(1, torch.stack(drawn)).squeeze(1).tolist()


def _hash(seed: int, number: int) -> int:
    """A seed for one of many streams; a hash, so that neighbouring seeds do not share streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest(), "little", signed=True)
