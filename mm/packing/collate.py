"""A sample becomes a document, and documents become a batch.

    Sample ─render─▶ pieces ─document─▶ Document ─collate─▶ Batch
           (tokenizer)      (entrances)          (shift, slots)

Media enter in one of two ways: an `Entrance` reserves slots for what an encoder makes of the decoded file, a `Spelling`
writes the codes that a tokenizer made of it as ids. Both answer from header facts how many tokens that will be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm import media
from mm.configure import RecipeError
from mm.encoders.base import Adapter, Grid, Transform
from mm.layers.layout import WHOLE, Share
from mm.packing.batch import IGNORE, Batch, Media
from mm.sample import Codes, MediaPart, Modality, Sample
from mm.tokenizers.text import Piece, TextTokenizer
from mm.tokenizers.vocabulary import Codebook, Vocabulary

Owner = tuple[int, int, int]
"""(source, shard, row in it) of a document; -1 for padding."""


class LengthMismatch(RuntimeError):
    """A well-formed sample came out longer or shorter than the plan promised: an error of the suite, never of the data.

    Packing it anyway would overflow the pack or shift every later document.
    """


class UnusableDocument(ValueError):
    """A document that does not fit itself, which would put labels or media of its neighbours in the wrong place."""


class Item(NamedTuple):
    """One media item of a document: the prepared tensor, its feature grid, its first slot and their number."""

    modality: Modality
    prepared: Tensor
    grid: Grid
    start: int
    length: int


class CodeRun(NamedTuple):
    """One media item of a document that stands there as ids: where it begins, and how many they are with both ends."""

    modality: Modality
    start: int
    length: int


class Laid(NamedTuple):
    """S tokens of a document that one piece became, as in `Document`, and the media item that they are, if any."""

    tokens: np.ndarray
    weights: np.ndarray
    modality: np.ndarray
    item: Item | CodeRun | None = None

    @classmethod
    def alike(cls, tokens: Sequence[int], weight: float, modality: Modality, item: Item | None = None) -> Laid:
        """Tokens of one weight and modality."""
        size = len(tokens)
        return cls(
            np.array(tokens, np.int64), np.full(size, weight, np.float32), np.full(size, modality, np.int8), item
        )


class Entrance(NamedTuple):
    """The continuous way in: features. `adapter` is only asked for lengths, so it may live on the meta device."""

    transform: Transform
    adapter: Adapter

    def length(self, facts: media.Facts) -> int:
        """Tokens that an item takes."""
        return self.adapter.length(self.transform.grid(facts))

    def lay(self, part: MediaPart | Codes, start: int, pad: int, loss: bool) -> Laid:
        """The item decoded and prepared, with slots that hold `pad` and bear no loss.

        Raises:
            BrokenMedia: the file cannot be decoded.
            RecipeError: the item is codes.
        """
        kind = part.modality
        if isinstance(part, Codes):
            raise RecipeError(f"the sample holds {kind.label} codes and the recipe has an encoder for {kind.label}")
        decoded = media.decode(part)
        grid = self.transform.grid(media.measure(decoded))
        size = self.adapter.length(grid)
        item = Item(kind, self.transform.prepare(decoded), grid, start, size)
        return Laid.alike([pad] * size, 0.0, kind, item)


class Spelling(NamedTuple):
    """The discrete way in: codes that a tokenizer wrote beforehand, as ids between the begin and end of their codebook.

    fingerprint: of the tokenizer
    """

    transform: Transform
    codebook: Codebook
    fingerprint: str

    def length(self, facts: media.Facts) -> int:
        """Tokens that an item takes."""
        return math.prod(self.transform.grid(facts)) + 2

    def lay(self, part: MediaPart | Codes, start: int, pad: int, loss: bool) -> Laid:
        """The item's ids, all of them targets or none. The two ends are special tokens of the text.

        Raises:
            RecipeError: the item is a file.
        """
        kind = part.modality
        if not isinstance(part, Codes):
            raise RecipeError(
                f"the recipe takes {kind.label} as codes (model.tokenizers.{kind.label}) and the sample holds a file; "
                "`MediaTokenizer.codes_of` makes codes of it"
            )
        ids = self.codebook.spell(part.ids)
        modality = np.full(len(ids), kind, np.int8)
        modality[[0, -1]] = Modality.TEXT
        return Laid(ids, np.full(len(ids), loss, np.float32), modality, CodeRun(kind, start, len(ids)))


WayIn = Entrance | Spelling


@dataclass(frozen=True, slots=True)
class Document:
    """A sample as L tokens.

    tokens: (L,) int64, the pad token in media slots
    weights: (L,) float32 loss weight of each token *as a target*, by whose words they are; 0: it is none
    modality: (L,) int8; -1 for padding
    items: its media in order
    factors: (L,) float32 by which the source multiplies the weights, see `mm.packing.weights`; None: 1. A factor of 0
        leaves a target without weight, and a target
    """

    tokens: np.ndarray
    weights: np.ndarray
    modality: np.ndarray
    items: tuple[Item | CodeRun, ...]
    factors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Document:
        """The first `length` tokens. The plan never cuts inside or before a media run."""
        if not 1 <= length <= len(self):
            raise LengthMismatch(f"a document of {len(self)} tokens cannot be cut to {length}")
        if any(item.start + item.length > length for item in self.items):
            raise LengthMismatch(f"cutting a document of {len(self)} tokens to {length} would cut a media run")
        factors = None if self.factors is None else self.factors[:length]
        return Document(self.tokens[:length], self.weights[:length], self.modality[:length], self.items, factors)

    @property
    def loss_weights(self) -> np.ndarray:
        """(L,) float32 weight of each token as a target, all told."""
        return self.weights if self.factors is None else self.weights * self.factors

    def problem(self) -> str | None:
        """Return what is wrong with the document, or None."""
        columns = {name: getattr(self, name) for name in ("tokens", "weights", "modality", "factors")}
        sizes = {name: column.shape for name, column in columns.items() if column is not None}
        if set(sizes.values()) != {self.tokens.shape} or self.tokens.ndim != 1:
            return f"its columns have the shapes {sizes}; expected one value for each token in all of them"
        if not len(self):
            return "it has no tokens: leave the sample out"
        if not (np.isfinite(self.loss_weights).all() and (self.loss_weights >= 0).all()):
            return "its loss weights are not finite, or below 0"
        end = 0
        for item in self.items:
            run = slice(item.start, item.start + item.length)
            if item.start < end or item.length < 1 or run.stop > len(self):
                return f"its {item.modality.label} item is in {run}; expected items in order, within {len(self)} tokens"
            if isinstance(item, Item) and (self.weights[run] > 0).any():
                return f"the slots of its {item.modality.label} item in {run} bear loss, and hold no token to predict"
            end = run.stop
        return None


class TextLength(NamedTuple):
    """Text tokens of a sample, and where in them it bears labels.

    before_last_media: of them, those before the last media item
    before_first_label: those before the first word that bears a label; -1 if no word does
    labelled_media: Σ 2^modality over the modalities whose items bear labels, as codes
    """

    tokens: int
    before_last_media: int
    before_first_label: int
    labelled_media: int


@dataclass(frozen=True)
class Processor:
    """Everything that turns samples into documents. Picklable: it travels into loader workers.

    entrances: how each modality of the recipe enters
    """

    text: TextTokenizer
    entrances: Mapping[Modality, WayIn]

    def text_length(self, sample: Sample) -> TextLength:
        """Length of the text of a sample; media are counted by `media_length`."""
        tokens = before = labelled_media = 0
        first_label, unpredicted = -1, 1  # the first token of a document has nothing before it
        for piece in self.text.render(self._spelled(sample)):
            if piece.part is not None:
                before = tokens
                labelled_media |= piece.loss << piece.part.modality
            elif piece.loss and first_label < 0 and len(piece.ids) > unpredicted:
                first_label = tokens + unpredicted
            tokens += len(piece.ids)
            if tokens or piece.part is not None:
                unpredicted = 0
        return TextLength(tokens, before, first_label, labelled_media)

    def _spelled(self, sample: Sample) -> Sample:
        """The sample with empty codes in the place of the files that enter as codes: they may bear loss."""
        spellings = self.spellings
        parts = (Codes(part.modality, (), part.role) if part.modality in spellings else part for part in sample.parts)
        return replace(sample, parts=tuple(parts)) if spellings else sample

    def media_length(self, modality: Modality, facts: media.Facts) -> int:
        """Tokens that an item takes, from its header facts alone."""
        return self.entrance(modality).length(facts)

    @property
    def spellings(self) -> dict[Modality, Spelling]:
        """The modalities that enter as codes."""
        return {modality: way for modality, way in self.entrances.items() if isinstance(way, Spelling)}

    @property
    def vocabulary(self) -> Vocabulary:
        """Of words and codes."""
        return Vocabulary(self.text.vocabulary, {modality: way.codebook for modality, way in self.spellings.items()})

    def entrance(self, modality: Modality) -> WayIn:
        """The way in of a modality.

        Raises:
            RecipeError: the recipe has none.
        """
        if modality not in self.entrances:
            raise RecipeError(
                f"the data holds {modality.label} and the recipe has no way in for it; "
                f"add model.encoders.{modality.label}, or model.tokenizers.{modality.label} for codes"
            )
        return self.entrances[modality]

    def document(self, sample: Sample) -> Document:
        """The sample decoded and tokenised.

        Raises:
            BrokenMedia: a file cannot be decoded.
        """
        return self.assemble(self.text.render(sample))

    def assemble(self, pieces: Iterable[Piece]) -> Document:
        """Rendered pieces as a document, with their media decoded and prepared, or spelled."""
        laid, start = [], 0
        for piece in pieces:
            laid.append(self._lay(piece, start))
            start += len(laid[-1].tokens)
        tokens, weights, modality, items = zip(*laid, strict=True)
        return Document(
            np.concatenate(tokens),
            np.concatenate(weights),
            np.concatenate(modality),
            tuple(item for item in items if item is not None),
        )

    def _lay(self, piece: Piece, start: int) -> Laid:
        if piece.part is None:
            return Laid.alike(piece.ids, float(piece.loss), Modality.TEXT)
        return self.entrance(piece.part.modality).lay(piece.part, start, self.text.pad, piece.loss)

    def padding(self, length: int) -> Document:
        """A document without content or loss, in the place of a broken sample or at the end of a pack."""
        return Document(
            np.full(length, self.text.pad, np.int64), np.zeros(length, np.float32), np.full(length, -1, np.int8), ()
        )

    def collate(
        self,
        packs: Sequence[Sequence[Document]],
        rows: Sequence[Sequence[Owner]],
        *,
        capacity: int | None = None,
        broken: Sequence[tuple[str, str]] = (),
        share: Share = WHOLE,
        seeds: Sequence[int] | None = None,
    ) -> Batch:
        """A batch of packs, each a list of documents with their owners.

        Args:
            capacity: pad every pack to this many tokens, for compiled code with static shapes; None adds nothing.
            broken: (sample, reason) of what was replaced by padding, for the run's ledger.
            share: the part of the stream that is to bear labels; the packs are padded so that it divides.
            seeds: of what layers draw, one a pack; all 0 if not given.

        Raises:
            LengthMismatch: a pack is over its capacity.
            UnusableDocument: a document is empty or does not fit itself.
            ValueError: there are no packs, or not as many owners as documents and seeds as packs.
        """
        _check(packs, rows, seeds)
        documents, owners, pack_starts = self._padded(packs, rows, capacity)
        offsets = np.cumsum([0, *(len(document) for document in documents)])
        tokens = np.concatenate([document.tokens for document in documents])
        bears = np.concatenate([document.weights > 0 for document in documents])
        labels, weights = _shift(tokens, bears, np.concatenate([one.loss_weights for one in documents]), offsets)
        held = share.of(len(tokens))
        for begin, end in ((0, held.start), (held.stop, len(tokens))):
            labels[begin:end], weights[begin:end] = IGNORE, 0.0
        return Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(np.concatenate([np.arange(len(document)) for document in documents])),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            modality=torch.from_numpy(np.concatenate([document.modality for document in documents])),
            offsets=torch.from_numpy(offsets.astype(np.int32)),
            packs=torch.tensor(pack_starts, dtype=torch.int32),
            rows=torch.tensor(owners, dtype=torch.int64).reshape(-1, 3),
            seeds=torch.tensor([0] * len(packs) if seeds is None else seeds, dtype=torch.int64),
            media=self._media(documents, offsets, held),
            broken=tuple(broken),
            share=share,
        )

    def _padded(
        self, packs: Sequence[Sequence[Document]], rows: Sequence[Sequence[Owner]], capacity: int | None
    ) -> tuple[list[Document], list[Owner], list[int]]:
        """Documents of all packs with the padding behind each, their owners, and where packs start, then the length."""
        documents: list[Document] = []
        owners: list[Owner] = []
        pack_starts = [0]
        for pack, pack_rows in zip(packs, rows, strict=True):
            size = sum(len(document) for document in pack)
            documents.extend(pack)
            owners.extend(pack_rows)
            spare = 1 if size == 0 else 0
            if capacity is not None:
                spare = capacity - size
            if spare < 0:
                raise LengthMismatch(f"a pack of {size} tokens is over its capacity of {capacity}")
            if spare:
                documents.append(self.padding(spare))
                owners.append((-1, -1, -1))
            pack_starts.append(pack_starts[-1] + size + spare)
        return documents, owners, pack_starts

    def _media(self, documents: Sequence[Document], offsets: np.ndarray, held: slice) -> dict[Modality, Media]:
        """The items with slots that reach into a part of the stream."""
        found: dict[Modality, list[tuple[int, Item]]] = {}
        for number, document in enumerate(documents):
            for item in document.items:
                if isinstance(item, CodeRun):
                    continue
                begin = offsets[number] + item.start
                if begin < held.stop and begin + item.length > held.start:
                    found.setdefault(item.modality, []).append((number, item))
        media_by_modality = {}
        for modality, placed in found.items():
            slots = [np.arange(item.length) + item.start + offsets[number] for number, item in placed]
            media_by_modality[modality] = Media(
                inputs=self.entrances[modality].transform.collate([item.prepared for _, item in placed]),
                grids=tuple(item.grid for _, item in placed),
                slots=torch.from_numpy(np.concatenate(slots)),
                documents=torch.tensor([number for number, _ in placed]),
            )
        return media_by_modality


def _check(packs: Sequence[Sequence[Document]], rows: Sequence[Sequence[Owner]], seeds: Sequence[int] | None) -> None:
    """Raises what `Processor.collate` says of packs that would come out shifted."""
    if not packs:
        raise ValueError("a batch needs at least one pack; an empty one is a pack without documents")
    counts = {"documents": [len(pack) for pack in packs], "owners": [len(owners) for owners in rows]}
    if counts["documents"] != counts["owners"]:
        raise ValueError(f"documents and owners differ in number, pack by pack: {counts}")
    if seeds is not None and len(seeds) != len(packs):
        raise ValueError(f"{len(seeds)} seeds for {len(packs)} packs")
    for number, (pack, owners) in enumerate(zip(packs, rows, strict=True)):
        for place, (document, (source, shard, row)) in enumerate(zip(pack, owners, strict=True)):
            if (problem := document.problem()) is not None:
                raise UnusableDocument(
                    f"document {place} of pack {number} (source {source}, shard {shard}, row {row}): {problem}"
                )


def _shift(
    tokens: np.ndarray, bears: np.ndarray, of_targets: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights of the positions that predict: what follows, within the same document.

    Args:
        bears: (T,) bool, the tokens that are targets; of_targets: (T,) float32 their weights.
    """
    labels = np.full_like(tokens, IGNORE)
    weights = np.zeros_like(of_targets)
    bears = bears[1:].copy()
    bears[offsets[1:-1] - 1] = False  # the last token of a document would predict the next document's first
    predicting = np.flatnonzero(bears)
    labels[predicting] = tokens[predicting + 1]
    weights[predicting] = of_targets[predicting + 1]
    return labels, weights
