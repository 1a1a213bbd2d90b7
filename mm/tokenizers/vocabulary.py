"""One vocabulary for words and codes: text ids as they are, and behind them a codebook for each discrete modality.

    0 … text │ begin end first … first + K │ begin end first … │        ids of the decoder
     words   │            image            │      speech       │

An item stands in the stream as begin, its codes, end. Codebooks come in the order of `Modality`, so that ids depend on
which modalities are discrete and on their K alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm.configure import RecipeError
from mm.sample import Modality


@dataclass(frozen=True)
class Codebook:
    """Ids of one modality.

    begin, end: what stands around the codes of an item
    first: id of code 0; size: K, the number of codes
    """

    begin: int
    end: int
    first: int
    size: int

    @property
    def ids(self) -> range:
        """The ids of the codes."""
        return range(self.first, self.first + self.size)

    def spell(self, codes: Sequence[int]) -> np.ndarray:
        """(L + 2,) int64 ids of an item of L codes: begin, codes, end.

        Raises:
            ValueError: a code that is not in [0, K). It would mean a word, or a code of another modality.
        """
        if codes and (min(codes) < 0 or max(codes) >= self.size):
            raise ValueError(f"codes from {min(codes)} to {max(codes)}, of a codebook of {self.size}")
        return np.concatenate([[self.begin], np.array(codes, np.int64) + self.first, [self.end]])


@dataclass(frozen=True)
class Vocabulary:
    """The joint vocabulary: `text` ids of words, then the `codebooks`."""

    text: int
    codebooks: Mapping[Modality, Codebook]

    @classmethod
    def of(cls, text: int, sizes: Mapping[Modality, int]) -> Vocabulary:
        """The vocabulary of a text tokenizer with `text` ids and of media tokenizers with K codes each."""
        codebooks, free = {}, text
        for modality in sorted(sizes):
            codebooks[modality] = Codebook(begin=free, end=free + 1, first=free + 2, size=sizes[modality])
            free += 2 + sizes[modality]
        return cls(text, codebooks)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.text + sum(2 + codebook.size for codebook in self.codebooks.values())

    def modality_of(self, tokens: Tensor) -> Tensor:
        """(T,) int8: codes are of their modality; words, and the ends of items, are text."""
        modality = torch.zeros(tokens.shape, dtype=torch.int8, device=tokens.device)
        for kind, codebook in self.codebooks.items():
            modality[(tokens >= codebook.first) & (tokens < codebook.first + codebook.size)] = int(kind)
        return modality

    def check_fits(self, decoder: int) -> None:
        """Raises `RecipeError` unless a decoder's vocabulary holds all ids."""
        if decoder < self.size:
            codes = "".join(
                f" + 2 + {codebook.size} for {modality.label}" for modality, codebook in self.codebooks.items()
            )
            raise RecipeError(
                f"model.decoder has a vocabulary of {decoder}; the recipe needs at least {self.size}, {self.text} for "
                f"text{codes}. Set model.decoder.config.vocabulary={self.size}"
            )
