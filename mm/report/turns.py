"""A document as people read it: who says what, which words bear loss, and what stands around the words.

    Document ─pieces─▶ whole characters, media items ─places─▶ part of the sample, or scaffold ─▶ turns of spans

The loss is laid over tokens, not over parts, so everything shown here is read off the tokens that the model gets; the
sample only tells whose words they are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

from mm.packing.collate import CodeRun, Document, Item
from mm.report.page import counted
from mm.report.pictures import picture_of
from mm.sample import MediaPart, Sample, Text
from mm.tokenizers.text import TextTokenizer, WordsOnly

HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are shown alike: text of one loss weight, or one media item.

    text: the words, or what the item became; picture: data URL of a media item, or empty: of text and of codes
    tokens: how many of the stream; weight: loss weight of each as a target
    scaffold: whether the text stands around the words of the sample: a chat template's, or the end of the document
    """

    modality: str
    text: str
    tokens: int
    weight: float = 0.0
    picture: str = ""
    scaffold: bool = False

    @property
    def is_words(self) -> bool:
        """Whether it is words of the sample."""
        return self.modality == "text" and not self.scaffold


@dataclass(frozen=True)
class Turn:
    """What one role says in a chat; the only turn of any other document has no role."""

    role: str
    spans: tuple[Span, ...]

    @property
    def runs(self) -> list[list[Span]]:
        """The spans, those together that read as one text: words that differ in nothing but weight."""
        alike = groupby(enumerate(self.spans), lambda one: -1 if one[1].is_words else one[0])
        return [[span for _, span in group] for _, group in alike]


def turns_of(sample: Sample, document: Document, tokenizer: TextTokenizer) -> tuple[Turn, ...]:
    """The document of a sample in stream order, as turns of spans.

    Raises:
        BrokenMedia: an item of the sample cannot be decoded.
    """
    if isinstance(tokenizer, WordsOnly):
        sample = replace(sample, parts=tuple(part for part in sample.parts if isinstance(part, Text)))
    pieces = list(_pieces(document, tokenizer))
    placed = zip(_places(sample, pieces), pieces, strict=True)
    turns = []
    for role, turn in groupby(placed, key=lambda pair: pair[0].role):
        alike = groupby(turn, key=lambda pair: (pair[0].part, pair[1].weight, pair[1].item and pair[1].start))
        turns.append(
            Turn(role, tuple(_span(sample, part, [piece for _, piece in group]) for (part, *_), group in alike))
        )
    return tuple(turns)


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of a document: a media item, or as few as make whole characters."""

    start: int
    stop: int
    weight: float
    text: str = ""
    item: Item | CodeRun | None = None


class _Place(NamedTuple):
    """Where a piece belongs: a part of the sample, or None for what stands around the parts; and whose turn it is."""

    part: int | None
    role: str


def _pieces(document: Document, tokenizer: TextTokenizer) -> Iterator[_Piece]:
    items, weights = {item.start: item for item in document.items}, document.loss_weights
    start = context = 0  # the context is the piece before: some tokenizers write a space only between tokens
    while start < len(document):
        if start in items:
            stop = start + items[start].length
            yield _Piece(start, stop, float(weights[start]), item=items[start])
            start = context = stop
            continue
        known = len(tokenizer.decode(document.tokens[context:start].tolist()))
        text, stop = HALF_A_CHARACTER, start
        while text.endswith(HALF_A_CHARACTER) and stop < len(document) and stop not in items:
            stop += 1
            text = tokenizer.decode(document.tokens[context:stop].tolist())
        yield _Piece(start, stop, float(weights[start]), text[known:])
        context, start = start, stop


def _places(sample: Sample, pieces: Sequence[_Piece]) -> list[_Place]:
    """Where every piece belongs: the words of each part stand in the document verbatim and in order."""
    found: list[_Place | None] = [None] * len(pieces)
    first = 0
    for number, part in enumerate(sample.parts):
        if isinstance(part, Text):
            mine = _words(part.text.strip() if part.role else part.text, pieces, first)
        else:
            mine = _item(pieces, first)
        found[mine.start : mine.stop] = [_Place(number, part.role or "")] * len(mine)
        first = max(first, mine.stop)
    return _with_scaffold(found, pieces)


def _item(pieces: Sequence[_Piece], first: int) -> range:
    """The next media item from piece `first` on."""
    number = next(number for number in range(first, len(pieces)) if pieces[number].item)
    return range(number, number + 1)


def _words(words: str, pieces: Sequence[_Piece], first: int) -> range:
    """The pieces that hold these words, from piece `first` on.

    Words whose end was cut, or that the tokenizer normalised, are taken to go on until the next media item.
    """
    if not words.strip():
        return range(0)
    ends = list(accumulate(len(piece.text) for piece in pieces[first:]))
    begin = "".join(piece.text for piece in pieces[first:]).find(words)
    if begin < 0:
        return range(first, next((n for n in range(first, len(pieces)) if pieces[n].item), len(pieces)))
    return range(first + bisect_right(ends, begin), first + bisect_left(ends, begin + len(words)) + 1)


def _with_scaffold(found: Sequence[_Place | None], pieces: Sequence[_Piece]) -> list[_Place]:
    """Places of all: scaffold ends a turn up to a line break or as long as it bears loss, and then opens the next."""
    places: list[_Place] = []
    for empty, group in groupby(range(len(found)), key=lambda number: found[number] is None):
        gap = list(group)
        if not empty:
            places += [place for place in found[gap[0] : gap[-1] + 1] if place]
            continue
        before = places[-1].role if places else None
        after = found[gap[-1] + 1] if gap[-1] + 1 < len(found) else None
        if before is None or after is None:
            closing = len(gap) if after is None else 0
        else:
            line = next((place + 1 for place, number in enumerate(gap) if "\n" in pieces[number].text), 0)
            bearing = next((place for place, number in enumerate(gap) if not pieces[number].weight), len(gap))
            closing = max(line, bearing)
        places += [_Place(None, before or "")] * closing
        places += [_Place(None, after.role if after else "")] * (len(gap) - closing)
    return places


def _span(sample: Sample, part: int | None, pieces: Sequence[_Piece]) -> Span:
    first, tokens = pieces[0], pieces[-1].stop - pieces[0].start
    if first.item is None:
        text = "".join(piece.text for piece in pieces)
        return Span("text", text, tokens, first.weight, scaffold=part is None)
    kind = first.item.modality.label
    if isinstance(first.item, CodeRun):
        return Span(kind, f"{kind}: {counted(tokens - 2, 'code')}", tokens, first.weight)
    media = sample.parts[part or 0]
    assert isinstance(media, MediaPart)  # `_item` gave its place
    label = f"{'×'.join(map(str, first.item.grid))} → {counted(tokens, 'token')}"
    return Span(kind, label, tokens, picture=picture_of(media))
