"""From a recipe to packs: index, text lengths, plan. Done before processes meet, so that no collective waits for it.

    card ─index─▶ places, header facts ─┬─▶ tokens, items, FLOPs of every row ─plan─▶ packs ─deal─▶ micro-steps
                  text lengths (column) ┤
                  `where`, drops ───────┘

Every process calls `open_data`; file locks let the first do the work and the others find it done.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from mm import configure
from mm.data import columns
from mm.data.card import Card
from mm.data.drops import dropped_rows
from mm.data.index import Index, fetch_rows_ahead, index_card
from mm.data.where import select
from mm.model.multimodal import MultimodalLM, build_model
from mm.packing.balance import deal
from mm.packing.collate import Processor
from mm.packing.hashing import hash64
from mm.packing.materialise import Materialiser, MicroStep
from mm.packing.plan import DROPPED, FILTERED, MISSING, QUANTITIES, PackingOptions, Plan, Source
from mm.sample import BrokenSample, Modality
from mm.tokenizers.text import TextTokenizer
from mm.train.parallel import World
from mm.train.recipe import Recipe, SourceOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """The model on the meta device with its processor: enough to plan, without reading any weights."""

    model: MultimodalLM
    processor: Processor

    @classmethod
    def of(cls, recipe: Recipe) -> Blueprint:
        model = build_model(recipe.model, meta=True)
        return cls(model, Processor(TextTokenizer.load(recipe.tokenizer), model.entrances))

    def media_of(self, index: Index) -> RowMedia:
        """What the media of every row cost, from header facts. Rows of equal facts are computed once."""
        _, first, which = np.unique(index.signature, return_index=True, return_inverse=True)
        counts = np.zeros((len(first), len(QUANTITIES)), np.int32)
        tokens = np.zeros((len(first), len(QUANTITIES)), np.int32)
        flops = np.zeros(len(first))
        for number, row in enumerate(first.tolist()):
            start, stop = index.media_starts[row : row + 2]
            for (modality, *_), facts in zip(index.media[start:stop].tolist(), index.facts(row), strict=True):
                modality = Modality(modality)
                transform, adapter = self.processor.entrance(modality)
                grid = transform.grid(facts)
                quantity = QUANTITIES.index(modality.label)
                counts[number, quantity] += 1
                tokens[number, quantity] += adapter.length(grid)
                flops[number] += self.model.media_flops(modality, grid)
        return RowMedia(counts[which], tokens[which], flops[which])


@dataclass(frozen=True)
class RowMedia:
    """What the media of n rows cost.

    counts, tokens: (n, M) items and embeddings of each quantity
    flops: (n,) forward FLOPs of encoders and adapters
    """

    counts: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray


@dataclass(frozen=True)
class PlannedData:
    """The packs of some sources, and how they are handed out."""

    blueprint: Blueprint
    plan: Plan
    names: tuple[str, ...]
    indexes: tuple[Index, ...]
    media: tuple[RowMedia, ...]

    def materialiser(self, capacity: int | None = None, ahead: bool = False) -> Materialiser:
        """Batches of the plan; `ahead`: with remote shards of what comes next fetched in the background."""
        return Materialiser(
            self.plan.reader(),
            self.indexes,
            self.blueprint.processor,
            names=self.names,
            capacity=capacity,
            ahead=partial(fetch_rows_ahead, self.indexes) if ahead and self.indexes[0].card.cache else None,
        )

    def costs(self, packs: Sequence[int]) -> np.ndarray:
        """(P, 2) forward FLOPs of each pack in the encoders and in the decoder; 0 for an empty pack (-1)."""
        costs = np.zeros((len(packs), 2))
        for number, pack in enumerate(packs):
            if pack < 0:
                continue
            rows = self.plan.pack(pack)
            encoders = sum(
                self.media[source].flops[rows.row[rows.source == source]].sum() for source in set(rows.source)
            )
            costs[number] = encoders, self.blueprint.model.decoder.flops(rows.length.tolist())
        return costs

    def micro_steps(
        self, world: World, micro_batch: int, *, seed: int, steps: range, first_pack: int
    ) -> Iterator[MicroStep]:
        """The micro-steps of one rank, step after step, `micro_steps_per_step` each."""
        for step in steps:
            packs = np.array(self.plan.batch_from(first_pack))
            first_pack += len(packs)
            dealt = packs[deal(self.costs(packs.tolist()), world.size, seed=int(hash64(seed, step)))]
            for group in dealt.reshape(-1, micro_batch, world.size):
                yield MicroStep(step, tuple(group[:, world.rank].tolist()))

    def every_pack(self, world: World) -> list[MicroStep]:
        """All packs of an ended plan, dealt evenly; empty packs fill up, so that ranks meet equally often."""
        total = self.plan.total_packs() or 0
        padded = [*range(total), *[-1] * (-total % world.size)]
        return [MicroStep(0, (pack,)) for pack in padded[world.rank :: world.size]]


def open_data(
    recipe: Recipe,
    blueprint: Blueprint,
    sources: Mapping[str, SourceOptions],
    folder: Path,
    *,
    epochs: float | None,
    start: Mapping[str, tuple[int, int]] | None = None,
    progress: bool = True,
) -> PlannedData:
    """Index the sources, measure their text and open the plan in `folder`.

    Args:
        start: where sources begin because earlier stages have read them, and the number of rows they had then. The plan
            of other positions lies in another folder, named by them.

    Raises:
        PlanChanged: `folder` holds the plan of another recipe or other data.
    """
    cache = Path(recipe.data.index).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    shard_cache = recipe.data.cache.open() if recipe.data.cache else None
    indexes, media, planned = [], [], []
    with FileLock(cache / "indexing.lock"):
        for name, options in sources.items():
            card = replace(Card.load(configure.find_preset(options.card)), cache=shard_cache)
            index = index_card(card, options.split, cache / "index", progress=progress)
            row_media = blueprint.media_of(index)
            excluded, selection = _selection(index, options.where)
            text = _text_lengths(index, blueprint.processor, progress)
            media_tokens = row_media.tokens.sum(axis=1, keepdims=True)
            usable = text[:, :, 0] > 0
            planned.append(
                Source(
                    name=name,
                    shards=np.diff(index.starts),
                    tokens=np.where(usable, text[:, :, 0] + media_tokens, 0).astype(np.int32),
                    choice_probabilities=np.array(index.card.choices),
                    counts=row_media.counts,
                    fingerprint=f"{index.fingerprint}-{blueprint.processor.text.fingerprint}",
                    weight=options.weight,
                    epochs=options.epochs,
                    media_end=np.where(usable, text[:, :, 1] + media_tokens, 0).astype(np.int32),
                    media_tokens=row_media.tokens,
                    excluded=excluded,
                    selection=selection,
                )
            )
            indexes.append(index)
            media.append(row_media)
    positions = _positions(planned, start or {})
    if positions:
        keys = chain.from_iterable(sorted(positions.items()))
        folder = folder.with_name(f"{folder.name}-{hash64(*keys):016x}")
    plan = Plan.open(folder, planned, recipe.packing, recipe.seed, epochs, positions, recipe.data.unit)
    return PlannedData(blueprint, plan, tuple(sources), tuple(indexes), tuple(media))


def _positions(sources: Sequence[Source], start: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Where each source starts. One with other rows than before starts anew: its order is another one."""
    positions = {}
    for source in sources:
        position, rows = start.get(source.name, (0, source.rows))
        if rows != source.rows:
            logger.warning(
                "%s has %d rows and had %d in the stage before: it starts from its beginning, and rows seen there are "
                "seen again",
                source.name,
                source.rows,
                rows,
            )
        elif position:
            positions[source.name] = position
    return positions


def check_division(packing: PackingOptions, world: int, micro_batch: int) -> None:
    """Raise unless the packs of a global batch divide evenly into micro-steps."""
    packs = packing.packs_per_batch
    if packs % (world * micro_batch):
        worlds = [size for size in range(1, packs + 1) if packs % (size * micro_batch) == 0]
        raise ValueError(
            f"a global batch of {packs} packs does not divide among {world} processes with micro_batch {micro_batch}; "
            f"it does among {', '.join(map(str, worlds)) or 'none: lower micro_batch'}, or change packing.batch"
        )


def _selection(index: Index, where: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """(n,) uint8 why a row is left out, as in `Source.excluded`, and what that was computed from.

    Raises:
        WhereError: the filter cannot be used, or selects nothing.
    """
    excluded = np.zeros(index.rows, np.uint8)
    selection: dict[str, Any] = {}
    if where is not None:
        chosen = select(index, where)
        excluded[~chosen.selected] = FILTERED
        excluded[chosen.missing] = MISSING
        selection |= {"where": chosen.expression, "where selects": _identity(chosen.selected)}
        selection |= {f"where.{name}": fingerprint for name, fingerprint in chosen.columns.items()}
    dropped = dropped_rows(index)
    if dropped.any():
        excluded[dropped] = DROPPED
        selection["dropped"] = _identity(dropped)
    return excluded, selection


def _identity(rows: np.ndarray) -> str:
    """How many rows, and which: a fingerprint."""
    return f"{rows.sum()} rows ({hashlib.blake2b(np.packbits(rows).tobytes(), digest_size=4).hexdigest()})"


def _text_lengths(index: Index, processor: Processor, progress: bool) -> np.ndarray:
    """(n, choices, 2) text tokens of every row, and those before its last media item ends; 0 where it is broken."""
    column = columns.compute_choices(
        index,
        "text_lengths",
        processor.text.fingerprint,
        processor.text_length,
        pa.list_(pa.int32()),
        progress=progress,
    )
    choices = len(index.card.choices)
    lengths = np.zeros((index.rows, choices, 2), np.int64)
    for row, values in enumerate(column.to_pylist()):
        for choice, value in enumerate(values or ()):
            if value is not None:
                lengths[row, choice] = value
    _tell_unusable(index, processor, lengths)
    return lengths


def _tell_unusable(index: Index, processor: Processor, lengths: np.ndarray) -> None:
    """Warn of rows without a length, with the reason of the first."""
    rows = np.flatnonzero((lengths[:, :, 0] == 0).all(axis=1))
    if not len(rows):
        return
    reason = "its text is empty"
    try:
        processor.text_length(index.sample(int(rows[0])))
    except BrokenSample as error:
        reason = str(error)
    logger.warning("%s: %d of %d rows cannot be used; the first: %s", index.card.name, len(rows), index.rows, reason)
