"""What may follow what: words, and items of discrete modalities, which begin, have all of their codes, and end.

words ─begin─▶ code × L ─▶ end ─▶ words                L: codes of an item, prod(grid)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.sample import Modality
from mm.tokenizers.vocabulary import Vocabulary

WORDS = 0
"""State of a document that may go on with words."""


@dataclass(frozen=True)
class Grammar:
    """The documents that may be generated.

    items: modalities that may be begun, and how many codes an item of each has; others can only be read
    """

    vocabulary: Vocabulary
    items: Mapping[Modality, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for modality in self.items.keys() - self.vocabulary.codebooks.keys():
            raise ValueError(f"{modality.label} cannot be generated: the vocabulary has no codes of it")

    def allowed(self, ids: int) -> Tensor:
        """(1 + 2M, V) bool: whether an id may come next, by `Cursor.state`; of a decoder with V ids.

        Ids beyond the vocabulary, by which many decoders are larger than their tokenizer, are never allowed.
        """
        table = torch.zeros(1 + 2 * len(self.vocabulary.codebooks), ids, dtype=torch.bool)
        table[WORDS, : self.vocabulary.text] = True
        for number, (modality, codebook) in enumerate(self.vocabulary.codebooks.items()):
            table[WORDS, codebook.begin] = modality in self.items
            table[1 + 2 * number, codebook.first : codebook.first + codebook.size] = True
            table[2 + 2 * number, codebook.end] = True
        return table

    def cursor(self, tokens: Iterable[int]) -> Cursor:
        """Behind these ids of a document, from its beginning."""
        cursor = Cursor(self)
        for token in tokens:
            cursor.read(token)
        return cursor


class Cursor:
    """How far a document has come."""

    def __init__(self, grammar: Grammar) -> None:
        self._begins = {
            codebook.begin: (number, codebook.end, grammar.items.get(modality, 0))
            for number, (modality, codebook) in enumerate(grammar.vocabulary.codebooks.items())
        }
        self._number, self._end, self._left = 0, None, 0  # the codebook of the item that is open, and its codes to come

    def read(self, token: int) -> None:
        """Go on by one id."""
        if token in self._begins:
            self._number, self._end, self._left = self._begins[token]
        elif token == self._end:
            self._end = None
        elif self._end is not None:
            self._left -= 1

    @property
    def state(self) -> int:
        """Row of `Grammar.allowed`."""
        if self._end is None:
            return WORDS
        return 1 + 2 * self._number if self._left > 0 else 2 + 2 * self._number

    @property
    def in_item(self) -> bool:
        """Whether a code comes next."""
        return self._end is not None and self._left > 0
