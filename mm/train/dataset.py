"""From a recipe to packs: index, text lengths, plan. Done before processes meet, so that no collective waits for it.

    sources ──rows of some shards──▶ plan ──packs──▶ deal ──▶ micro-steps ──▶ batches

Every process calls `open_data`; file locks let the first do the work and the others find it done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from filelock import FileLock

from mm import terminal
from mm.configure import RecipeError
from mm.data.card import MAPPING_VERSION
from mm.data.index import INDEX_VERSION, fetch_rows_ahead
from mm.layers.layout import WHOLE, Share
from mm.packing.balance import deal
from mm.packing.hashing import hash64
from mm.packing.materialise import Materialiser, MicroStep, Samples
from mm.packing.options import PackingOptions
from mm.packing.plan import Plan
from mm.packing.source import Source
from mm.packing.streams import Cursor
from mm.packing.windows import ReadTo
from mm.train.recipe import Recipe, SourceOptions
from mm.train.sources import Blueprint, OpenSource

logger = terminal.logger(__name__)

AHEAD = 2
"""Windows that are planned ahead of training."""


@dataclass(frozen=True)
class PlannedData:
    """The packs of some sources, and how they are handed out."""

    blueprint: Blueprint
    plan: Plan
    sources: tuple[OpenSource, ...]

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def samples(self) -> list[Samples]:
        return [source.read for source in self.sources]

    def materialiser(self, capacity: int | None = None, share: Share = WHOLE, ahead: bool = False) -> Materialiser:
        """Batches of the plan; `ahead`: with remote shards of what comes next fetched in the background."""
        shards = [source.samples for source in self.sources]
        return Materialiser(
            self.plan.reader(),
            self.samples,
            self.blueprint.processor,
            names=self.names,
            seed=self.plan.seed,
            capacity=capacity,
            share=share,
            weightings=[source.weighting for source in self.sources],
            ahead=partial(fetch_rows_ahead, shards) if ahead and shards[0].card.cache else None,
        )

    def micro_steps(
        self, reader: Share, micro_batch: int, *, seed: int, steps: range, first_pack: int
    ) -> Iterator[MicroStep]:
        """The micro-steps of one of some readers, step after step, `micro_steps_per_step` each."""
        end = first_pack + len(steps) * self.plan.packs_per_batch
        for step in steps:
            self.plan.ensure(first_pack + self.plan.packs_per_batch)
            packs = np.array(self.plan.batch_from(first_pack))
            first_pack += len(packs)
            self.plan.ensure_ahead(min(first_pack + AHEAD * self.plan.options.window, end))
            dealt = packs[deal(self.plan.costs(packs.tolist()), reader.count, seed=int(hash64(seed, step)))]
            for group in dealt.reshape(-1, micro_batch, reader.count):
                yield MicroStep(step, tuple(group[:, reader.index].tolist()))

    def every_pack(self, reader: Share) -> list[MicroStep]:
        """All packs of an ended plan, dealt evenly; empty packs fill up, so that readers meet equally often."""
        total = self.plan.total_packs() or 0
        padded = [*range(total), *[-1] * (-total % reader.count)]
        return [MicroStep(0, (pack,)) for pack in padded[reader.index :: reader.count]]


def open_sources(
    recipe: Recipe, blueprint: Blueprint, sources: Mapping[str, SourceOptions], *, lazy: bool = False
) -> list[OpenSource]:
    """Sources of a recipe, indexed unless `lazy`. One process works, the others wait for it."""
    folder = Path(recipe.data.index).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "indexing.lock"):
        return [OpenSource.open(name, options, recipe.data, blueprint, lazy) for name, options in sources.items()]


def open_data(
    recipe: Recipe,
    blueprint: Blueprint,
    sources: Mapping[str, SourceOptions],
    folder: Path,
    *,
    epochs: float | None,
    start: Mapping[str, ReadTo] | None = None,
    lazy: bool = False,
) -> PlannedData:
    """The plan of some sources in a folder, created or continued.

    Args:
        start: how far earlier stages have read the sources. The plan of other positions lies in another folder, named
            by them.
        lazy: index shards when the plan comes to them.

    Raises:
        PlanChanged: `folder` holds the plan of another recipe or other data.
    """
    opened = open_sources(recipe, blueprint, sources, lazy=lazy)
    planned = [one.source() for one in opened]
    begin = _begin(planned, start or {})
    plan = Plan.open(
        stage_folder(folder, start or {}),
        planned,
        recipe.packing,
        recipe.seed,
        epochs,
        begin,
        recipe.data.unit,
        blueprint.document_flops,
        blueprint.identity() | {"version of samples": [INDEX_VERSION, MAPPING_VERSION]},
        progress=True,
    )
    return PlannedData(blueprint, plan, tuple(opened))


def stage_folder(folder: Path, start: Mapping[str, ReadTo]) -> Path:
    """Where the plan lies that starts where earlier stages have read to."""
    keys = [(name, *read.cursor) for name, read in sorted(start.items())]
    return folder.with_name(f"{folder.name}-{hash64(*chain.from_iterable(keys)):016x}") if keys else folder


def _begin(sources: Sequence[Source], start: Mapping[str, ReadTo]) -> dict[str, Cursor]:
    """Where each source starts. One with other rows than before starts anew: its order is another one."""
    begin = {}
    for source in sources:
        if source.name not in start:
            continue
        cursor, shards, rows = start[source.name]
        if shards == source.shards and (rows is None or source.rows is None or rows == source.rows):
            begin[source.name] = cursor
        else:
            logger.warning(
                "%s has %s and had %s in the stage before: it starts from its beginning, and rows seen there are seen "
                "again",
                source.name,
                _amount(source.shards, source.rows),
                _amount(shards, rows),
            )
    return begin


def _amount(shards: int, rows: int | None) -> str:
    return f"{shards} shards" if rows is None else f"{rows} rows"


def check_division(packing: PackingOptions, world: int, micro_batch: int) -> None:
    """Raise unless the packs of a global batch divide evenly into micro-steps."""
    packs = packing.packs_per_batch
    if packs % (world * micro_batch):
        worlds = [size for size in range(1, packs + 1) if packs % (size * micro_batch) == 0]
        raise RecipeError(
            f"a global batch of {packs} packs does not divide among {world} processes with micro_batch {micro_batch}; "
            f"it does among {', '.join(map(str, worlds)) or 'none: lower micro_batch'}, or change packing.batch"
        )
