"""The sources of a recipe: what the plan asks of their rows, from header facts and text lengths.

    card ─index─▶ places, header facts ─┬─▶ tokens, items, FLOPs of the rows of some shards
                  text lengths (column) ┤
                  `where`, drops ───────┘

With ``data.lazy`` the shards are indexed when the plan comes to them, in the background of training; else all of them
before it begins.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mm import configure
from mm.configure import RecipeError
from mm.data import columns
from mm.data.card import Card
from mm.data.codes import CodeColumn, CodedSamples
from mm.data.drops import dropped_rows, drops_identity
from mm.data.index import Index, SplitSamples, index_card
from mm.data.where import normal_form, select
from mm.media import Facts, ImageFacts, PointFacts, SpeechFacts
from mm.model.build import build_trainable
from mm.model.multimodal import MultimodalLM, build_processor
from mm.model.trainable import Trainable
from mm.objectives.base import Objective
from mm.packing.collate import Processor, TextLength
from mm.packing.materialise import Samples
from mm.packing.source import DROPPED, FILTERED, MISSING, QUANTITIES, Rows, Source
from mm.packing.weights import Factor, Weighting
from mm.sample import BrokenSample, Modality
from mm.tokenizers.text import WordsOnly
from mm.train.recipe import DataOptions, Recipe, SourceOptions

logger = logging.getLogger(__name__)

TYPICAL: dict[Modality, tuple[Facts, ...]] = {
    Modality.IMAGE: (ImageFacts(224, 224), ImageFacts(640, 480), ImageFacts(480, 640), ImageFacts(1920, 1080)),
    Modality.SPEECH: (SpeechFacts(16_000, 16_000), SpeechFacts(480_000, 16_000), SpeechFacts(441_000, 44_100)),
    Modality.POINT: (PointFacts(1024, 3), PointFacts(8192, 6)),
}
"""What an encoder or a tokenizer makes of these tells it from another one."""


@dataclass(frozen=True)
class Blueprint:
    """The model on the meta device with its processor: enough to plan, without reading any weights.

    learned: modalities of the labels that the objective learns from, see `Objective.learned`
    """

    model: Trainable
    processor: Processor
    learned: frozenset[Modality] | None

    @classmethod
    def of(cls, recipe: Recipe) -> Blueprint:
        model = build_trainable(recipe.model, meta=True)
        processor = build_processor(recipe.model, model, recipe.text_tokenizer())
        objective = configure.build(recipe.objective, Objective)
        # Another model has no labels, and `Objective.prepare` refuses an objective that needs some.
        return cls(model, processor, objective.learned if isinstance(model, MultimodalLM) else None)

    def identity(self) -> dict[str, Any]:
        """What lengths and costs follow from, for `Plan.open`: tokens and FLOPs of some media and documents."""
        documents = self.document_flops(np.array([1, 1024])).tolist()
        identity: dict[str, Any] = {"decoder FLOPs of 1 and 1024 tokens": documents}
        for modality in self.processor.entrances:
            identity[f"tokens and FLOPs of typical {modality.label} items"] = [
                list(self.item_cost(modality, facts)) for facts in TYPICAL[modality]
            ]
        for column in self.code_columns:
            identity[f"tokenizer of {column.modality.label}"] = column.fingerprint
        return identity

    @property
    def code_columns(self) -> list[CodeColumn]:
        """Where the codes of discrete modalities are."""
        return [
            CodeColumn(modality, spelling.fingerprint, spelling.codebook.size)
            for modality, spelling in self.processor.spellings.items()
        ]

    def item_cost(self, modality: Modality, facts: Facts) -> tuple[int, float]:
        """Tokens that a media item takes, and forward FLOPs of its encoder and adapter."""
        entrance = self.processor.entrance(modality)
        return entrance.length(facts), self.model.media_flops(modality, entrance.transform.grid(facts))

    def document_flops(self, lengths: np.ndarray) -> np.ndarray:
        """(n,) forward FLOPs of documents, beside those of their media."""
        return self.model.document_flops(lengths)

    def media_of(self, index: Index) -> RowMedia:
        """What the media of every row cost, from header facts. Rows of equal facts are computed once."""
        if isinstance(self.processor.text, WordsOnly):
            return RowMedia.none(index.rows)
        _, first, which = np.unique(index.signature, return_index=True, return_inverse=True)
        counts = np.zeros((len(first), len(QUANTITIES)), np.int32)
        tokens = np.zeros((len(first), len(QUANTITIES)), np.int32)
        flops = np.zeros(len(first))
        for number, row in enumerate(first.tolist()):
            start, stop = index.media_starts[row : row + 2]
            for (modality, *_), facts in zip(index.media[start:stop].tolist(), index.facts(row), strict=True):
                length, cost = self.item_cost(Modality(modality), facts)
                quantity = QUANTITIES.index(Modality(modality).label)
                counts[number, quantity] += 1
                tokens[number, quantity] += length
                flops[number] += cost
        return RowMedia(counts[which], tokens[which], flops[which])


@dataclass(frozen=True)
class RowMedia:
    """What the media of n rows cost.

    counts, tokens: (n, M) items of each quantity, and tokens that they take
    flops: (n,) forward FLOPs of encoders and adapters
    """

    counts: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray

    @classmethod
    def none(cls, rows: int) -> RowMedia:
        """Of rows whose media are left out."""
        nothing = np.zeros((rows, len(QUANTITIES)), np.int32)
        return cls(nothing, nothing, np.zeros(rows))


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A source of a recipe, open for planning and reading.

    index: of all its shards; None if they are indexed when the plan comes to them
    excluded: (n,) as in `Rows`, where there is an index; None if all rows take part
    selection: what that was computed from
    told: whether it was told that some rows cannot be used; a list to be written to
    """

    name: str
    options: SourceOptions
    samples: SplitSamples
    blueprint: Blueprint
    index: Index | None
    excluded: np.ndarray | None
    selection: dict[str, Any]
    told: list[bool] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, options: SourceOptions, data: DataOptions, blueprint: Blueprint, lazy: bool) -> OpenSource:
        """Indexes the source, computes its text lengths and selects its rows, if that is not to be done later."""
        cache = data.cache.open() if data.cache else None
        card = replace(Card.load(configure.find_preset(options.card)), cache=cache)
        folder = Path(data.index).expanduser() / "index"
        if lazy:
            samples = SplitSamples(card, options.split, folder, card.shards(options.split))
            selection: dict[str, Any] = {"dropped": drops_identity(card, options.split)}
            if options.where is not None:
                selection["where"] = normal_form(options.where)
            return cls(name, options, samples, blueprint, None, None, selection)
        index = index_card(card, options.split, folder, processes=None)
        samples = SplitSamples(card, options.split, folder, [entry.shard for entry in index.shards], index)
        processor = blueprint.processor
        columns.ensure_choices(index, *_lengths_of(processor), processes=None)
        for column in blueprint.code_columns:
            column.check_computed(index)
        source = cls(name, options, samples, blueprint, index, *excluded_rows(index, options.where))
        source.weighting.check(index)
        return source

    @cached_property
    def read(self) -> Samples:
        """The samples as training reads them: items of discrete modalities as their codes."""
        found = self.blueprint.code_columns
        return CodedSamples(self.samples, found) if found else self.samples

    @cached_property
    def weighting(self) -> Weighting:
        """The loss weights of its tokens.

        Raises:
            RecipeError: `weights` names no factor.
        """
        factors = {}
        for name, spec in self.options.weights.items():
            try:
                factors[name] = configure.build(spec, Factor)
            except RecipeError as error:
                raise RecipeError(f"source {self.name}, weights.{name}: {error}") from error
        return Weighting(factors, self.samples, self.blueprint.processor.text.fingerprint)

    @property
    def errors(self) -> int:
        """Records that are no samples, as far as is known."""
        return sum(entry.errors for entry in self.samples.known)

    def source(self) -> Source:
        """What the plan needs of it."""
        text = self.blueprint.processor.text.fingerprint
        return Source(
            name=self.name,
            shards=len(self.samples.shards),
            load=self.rows,
            choice_probabilities=np.array(self.samples.card.choices),
            fingerprint=f"{self._names if self.index is None else self.index.fingerprint}-{text}",
            shard_rows=None if self.index is None else np.diff(self.index.starts),
            weight=self.options.weight,
            epochs=self.options.epochs,
            selection=self.selection | {"learned": _labels(self._learned)},
        )

    @cached_property
    def _learned(self) -> frozenset[Modality] | None:
        """Modalities whose labels have weight in this source; None if labels are not needed."""
        learned = self.blueprint.learned
        return None if learned is None else frozenset(one for one in learned if not self.weighting.mutes(one))

    def rows(self, shards: Sequence[int]) -> Rows:
        """What the plan needs of the rows of some shards. Indexes those that are not.

        Raises:
            WhereError: the filter cannot be used on them.
            ColumnError: their items enter as codes that are not there.
        """
        index = self.samples.index(shards)
        for column in self.blueprint.code_columns:
            column.check_computed(index)
        self.weighting.check(index)
        media = self.blueprint.media_of(index)
        text = _text_lengths(index, self.blueprint.processor)
        self._tell_unusable(index, text)
        media_tokens = media.tokens.sum(axis=1, keepdims=True)
        usable = text[:, :, 0] >= 0
        return Rows(
            shards=np.diff(index.starts),
            tokens=np.where(usable, text[:, :, 0] + media_tokens, 0).astype(np.int32),
            counts=media.counts,
            media_end=np.where(usable, text[:, :, 1] + media_tokens, 0).astype(np.int32),
            first_label=None if self._learned is None else first_labels(text, media_tokens, self._learned),
            media_tokens=media.tokens,
            media_flops=media.flops,
            excluded=self._excluded(index, shards),
            stamps=np.array([entry.number for entry in index.shards], np.uint32),
        )

    def _excluded(self, index: Index, shards: Sequence[int]) -> np.ndarray | None:
        """(n,) uint8 of the rows of some shards, whose index is `index`; None if all take part."""
        if self.index is None:
            excluded, _ = excluded_rows(index, self.options.where, part=True)
            return excluded
        if self.excluded is None:
            return None
        starts = self.index.starts
        return np.concatenate([self.excluded[slice(*starts[shard : shard + 2])] for shard in shards])

    def _tell_unusable(self, index: Index, text: np.ndarray) -> None:
        """Warn of the first rows without a length, with the reason of the first of them."""
        rows = np.flatnonzero((text[:, :, 0] < 0).all(axis=1))
        if not len(rows) or self.told:
            return
        self.told.append(True)
        reason = "its text is empty"
        try:
            self.blueprint.processor.text_length(index.sample(int(rows[0])))
        except BrokenSample as error:
            reason = str(error)
        some, all_shards = len(index.shards), len(self.samples.shards)
        where = "" if some == all_shards else f" in {some} of its {all_shards} shards"
        logger.warning(
            "%s: %d of %d rows%s cannot be used; the first: %s", self.name, len(rows), index.rows, where, reason
        )

    @property
    def _names(self) -> str:
        """A fingerprint of which shards there are, and of what the card makes of them."""
        card = self.samples.card
        shards = (shard.removeprefix(f"{card.path.parent}/") for shard in self.samples.shards)
        return hashlib.blake2b("\n".join([card.mapping_fingerprint, *shards]).encode(), digest_size=16).hexdigest()


def excluded_rows(index: Index, where: str | None, *, part: bool = False) -> tuple[np.ndarray | None, dict[str, Any]]:
    """(n,) uint8 why a row is left out, as in `Rows.excluded`, or None, and what that was computed from.

    Args:
        part: the index is of some shards only, where nothing may be selected.

    Raises:
        WhereError: the filter cannot be used, or selects nothing.
    """
    excluded = np.zeros(index.rows, np.uint8)
    selection: dict[str, Any] = {}
    if where is not None:
        chosen = select(index, where, part=part)
        excluded[~chosen.selected] = FILTERED
        excluded[chosen.missing] = MISSING
        selection |= {"where": chosen.expression, "where selects": _identity(chosen.selected)}
        selection |= {f"where.{name}": fingerprint for name, fingerprint in chosen.columns.items()}
    dropped = dropped_rows(index)
    if dropped.any():
        excluded[dropped] = DROPPED
        selection["dropped"] = _identity(dropped)
    return excluded if selection else None, selection


def _identity(rows: np.ndarray) -> str:
    """How many rows, and which: a fingerprint."""
    return f"{rows.sum()} rows ({hashlib.blake2b(np.packbits(rows).tobytes(), digest_size=4).hexdigest()})"


def _lengths_of(processor: Processor) -> tuple[Any, ...]:
    """Name, fingerprint, function and type of the column of text lengths."""
    spelled = _labels(frozenset(processor.spellings)) or []
    fingerprint = " ".join([processor.text.fingerprint, "with labels", *spelled])
    return "text_lengths", fingerprint, processor.text_length, pa.list_(pa.int32())


def _labels(modalities: frozenset[Modality] | None) -> list[str] | None:
    return None if modalities is None else [modality.label for modality in sorted(modalities)]


def first_labels(text: np.ndarray, media_tokens: np.ndarray, learned: frozenset[Modality]) -> np.ndarray:
    """(n, C) int32 as in `Rows.first_label`. Items are never cut, so that only words behind the last one can be.

    Args:
        text: (n, C, 4) `TextLength` under each choice; media_tokens: (n, 1) tokens of all items.
        learned: modalities whose labels count. The two ends of an item's codes are text.
    """
    tokens, before_media, before_label, labelled = np.moveaxis(text, 2, 0)
    first = tokens + media_tokens
    if Modality.TEXT in learned:
        kept = before_label < before_media
        first = np.where(before_label >= 0, before_label + np.where(kept, 0, media_tokens), first)
        first = np.where(labelled > 0, 0, first)
    spelled = sum(1 << modality for modality in learned)
    return np.where((labelled & spelled) > 0, 0, first).astype(np.int32)


def _text_lengths(index: Index, processor: Processor) -> np.ndarray:
    """(n, C, 4) `TextLength` of every row under each choice; -1 where it is broken."""
    column = columns.compute_choices(index, *_lengths_of(processor), processes=None, progress=False)
    choices = len(index.card.choices)
    lengths = np.full((index.rows * choices, len(TextLength._fields)), -1, np.int64)
    whole = pa.chunked_array(column, column.type).combine_chunks()
    present = np.repeat(np.asarray(whole.is_valid()), choices)  # a row that broke has no choices at all
    of_choices = whole.flatten()
    present[present] = np.asarray(of_choices.is_valid())
    lengths[present] = of_choices.flatten().to_numpy(zero_copy_only=False).reshape(-1, lengths.shape[1])
    return lengths.reshape(index.rows, choices, lengths.shape[1])
