"""What a tokenizer makes of the texts of some cards: tokens, characters a token, and bits that frequencies alone need.

python -m benchmarks.texts TOKENIZER CARD …
"""

from __future__ import annotations

import sys
from collections import Counter
from math import log2
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mm.data.card import Card
from mm.tokenizers.bpe import texts_of
from mm.tokenizers.text import TextTokenizer


def main(tokenizer: TextTokenizer, cards: list[Card]) -> None:
    """Prints a row a split. A document's end token counts; `bits` is the entropy of the tokens' frequencies."""
    columns = ("source", "documents", "characters", "tokens", "tokens a document", "characters a token")
    table = Table(*columns, "ids used", "bits a token")
    for card in cards:
        for split in card.splits:
            counts, characters, documents = Counter[int](), 0, 0
            for text in texts_of(card, sys.maxsize, split):
                counts.update([*tokenizer.encode(text), tokenizer.end])
                characters += len(text)
                documents += 1
            tokens = counts.total()
            bits = -sum(count / tokens * log2(count / tokens) for count in counts.values())
            sizes = (f"{documents:,}", f"{characters:,}", f"{tokens:,}")
            ratios = (f"{tokens / documents:.1f}", f"{characters / tokens:.2f}", f"{len(counts):,}", f"{bits:.2f}")
            table.add_row(f"{card.name}/{split}", *sizes, *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(TextTokenizer.load(sys.argv[1]), [Card.load(Path(path)) for path in sys.argv[2:]])
