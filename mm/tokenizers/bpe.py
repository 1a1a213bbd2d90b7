"""A small byte-level BPE of one's own: for models whose embedding table would otherwise be most of them.

    cards ──texts──▶ train_bpe ──▶ Tokenizer ──save──▶ tokenizer.json, tokenizer_config.json ──▶ tokenizer: {path: …}

All 256 bytes are ids, so nothing is unknown and every text reads back; one more id ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mm.data.card import Card
from mm.sample import BrokenSample, Text

END = "<|end|>"
"""Ends a document; id 0."""
SMALLEST = 257
"""The bytes and the end token."""


class BpeError(ValueError):
    """Texts of which no such tokenizer can be made; the message says why."""


def texts_of(card: Card, characters: int, split: str = "train") -> Iterator[str]:
    """The texts of a split's samples in the order of its shards, until there are so many characters."""
    for shard in card.shards(split):
        for scanned in card.open(shard).scan():
            if scanned.record is None:
                continue
            try:
                parts = card.sample(scanned.record).parts
            except BrokenSample:  # the index lists them; here they are texts less
                continue
            for text in (part.text for part in parts if isinstance(part, Text)):
                if characters <= 0:
                    return
                yield text
                characters -= len(text)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer with `size` ids. The same texts in any order give the same one.

    Raises:
        BpeError: `size` leaves no room for the bytes, or the texts are too few for so many ids.
    """
    if size < SMALLEST:
        raise BpeError(f"size {size}, expected {SMALLEST} or more: 256 bytes and the end token")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < size:
        raise BpeError(f"the texts give {tokenizer.get_vocab_size()} ids of {size}; take more text, or fewer ids")
    return tokenizer


def save_bpe(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder that `TextTokenizer.load` and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
