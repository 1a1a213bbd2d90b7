"""What a recipe would train on, before any weights are read: `mm plan` and `mm inspect`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table

from mm.configure import RecipeError
from mm.model.multimodal import MultimodalLM
from mm.packing.balance import deal, imbalance
from mm.train.dataset import PlannedData, open_data
from mm.train.meter import training_factors
from mm.train.optim import freeze
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint
from mm.train.stages import open_stages

WORLDS = (2, 4, 8)
BATCHES = 32  # global batches over which balance is measured

MOST_PACKS, MOST_SAMPLES, MOST_PASSES = 2**16, 2**20, 100
"""Packs, samples and passes over a source after which a look at a recipe plans no further: what follows is like it."""


def planned(recipe: Recipe, packs: int | None = None) -> PlannedData:
    """The plan of a recipe: that of its run where there is one, else one that lasts as long as this process.

    A look at a recipe binds nothing: the next look may be at other options.

    Args:
        packs: to plan, if the sources do not end before; None for those of the run, up to `MOST_PACKS`.
    """
    folder = _folder(recipe) / "plan"
    data = open_data(
        recipe, Blueprint.of(recipe), recipe.data.sources, folder, epochs=recipe.epochs, lazy=recipe.data.lazy
    )
    if packs is not None:
        data.plan.ensure(packs, progress=True)
        return data
    wanted = MOST_PACKS if recipe.steps is None else min(recipe.steps * recipe.packing.packs_per_batch, MOST_PACKS)
    while data.plan.planned < wanted and not data.plan.ended and not _seen_enough(data):
        data.plan.ensure(data.plan.planned + 1, progress=True)
    return data


def _seen_enough(data: PlannedData) -> bool:
    statistics = data.plan.statistics()
    passes = max(source.epochs for source in statistics.sources.values())
    return statistics.samples >= MOST_SAMPLES or passes >= MOST_PASSES


def _folder(recipe: Recipe) -> Path:
    """The run's folder if it has a plan, else one that lasts as long as this process."""
    if (recipe.folder / "plan" / "plan.json").exists():
        return recipe.folder
    folder = Path(tempfile.mkdtemp(prefix="mm-plan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def planned_at(recipe: Recipe, step: int) -> tuple[PlannedData, int]:
    """The plan that holds a step of the run, and the step's number in it.

    Raises:
        RecipeError: the run ends before.
    """
    if not recipe.stages:
        if recipe.steps is not None and step >= recipe.steps:
            raise RecipeError(f"the run ends after {recipe.steps:,} steps; there is no step {step}")
        data, size = planned(recipe, (step + 1) * recipe.packing.packs_per_batch), recipe.packing.packs_per_batch
        if data.plan.planned <= step * size:
            raise RecipeError(f"the data ends after {-(-data.plan.planned // size):,} steps; there is no step {step}")
        return data, step
    end = 0
    for stage in open_stages(recipe, _folder(recipe)):
        if step < stage.end:
            return stage.data, step - stage.begin
        end = stage.end
    raise RecipeError(f"the run ends after {end} steps; there is no step {step}")


def preview(recipe: Recipe) -> Iterator[RenderableType]:
    """Tables of what the recipe trains on, what is left out and why, and what it costs; for each of its stages."""
    if not recipe.stages:
        yield from _preview(recipe, planned(recipe))
        return
    for stage in open_stages(recipe, _folder(recipe)):
        yield Rule(f"stage {stage.number}: steps {stage.begin:,} to {stage.end - 1:,}")
        yield from _preview(stage.recipe, stage.data)
        packs = stage.packs_at(stage.end)
        if packs > max(MOST_PACKS, stage.data.plan.planned) and stage.number + 1 < len(recipe.stages):
            yield Rule(f"the stages after it begin behind its {packs:,} packs, too many to plan here")
            return


def _preview(recipe: Recipe, data: PlannedData) -> Iterator[RenderableType]:
    yield sources_table(data)
    yield dropped_table(data)
    yield run_table(recipe, data)


def sources_table(data: PlannedData) -> Table:
    statistics, weighted = data.plan.statistics(), data.plan.weighted
    unit = "samples" if weighted and data.plan.unit == "samples" else "tokens"
    table = Table("source", title="what is seen", title_justify="left")
    asked = ["asked"] if weighted else []
    for column in ("samples", "epochs", "tokens", f"share of {unit}", *asked, "media items", "media tokens"):
        table.add_column(column, justify="right")
    for name, source in statistics.sources.items():
        items = ", ".join(f"{count:,} {modality}" for modality, count in source.items.items() if count)
        tokens = ", ".join(f"{count:,} {modality}" for modality, count in source.media_tokens.items() if count)
        table.add_row(
            name,
            f"{source.samples:,}",
            f"{source.epochs:.2f}",
            f"{source.tokens:,}",
            f"{source.sample_share if unit == 'samples' else source.share:.2%}",
            *([f"{source.asked:.2%}"] if weighted else []),
            items or "–",
            tokens or "–",
        )
    return table


def dropped_table(data: PlannedData) -> Table:
    """Rows that are passed over, by reason, once for every epoch, and records that are no samples at all."""
    table = Table("source", "left out", title="what is not seen", title_justify="left")
    table.add_column("rows, over all epochs", justify="right")
    statistics = data.plan.statistics()
    for (name, source), opened in zip(statistics.sources.items(), data.sources, strict=True):
        for reason, count in source.dropped.items():
            if count:
                table.add_row(name, reason, f"{count:,}")
        if source.truncated:
            table.add_row(name, "text cut at the end (seen, but shortened)", f"{source.truncated:,}")
        if errors := opened.errors:
            table.add_row(name, "unreadable, see `mm index`", f"{errors:,}")
    if not table.row_count:
        table.add_row("all", "nothing", "0")
    return table


def run_table(recipe: Recipe, data: PlannedData) -> Table:
    """Packs, fill, steps, FLOPs and balance."""
    statistics, packing = data.plan.statistics(), recipe.packing
    table = Table("figure", title="the run", title_justify="left")
    table.add_column("value", justify="right")
    steps, ends = recipe.steps, -(-statistics.packs // packing.packs_per_batch)
    about = ""
    if steps is None:
        steps = ends if data.plan.ended else round(ends / max(data.plan.passed(), 1e-9))
        about = "" if data.plan.ended else "about "
    used = min(steps * packing.packs_per_batch, statistics.packs)
    beyond = "" if used == statistics.packs else f"; {statistics.packs:,} are planned, and counted above"
    table.add_row("packs", f"{used:,} of {packing.capacity:,} tokens{beyond}")
    above = 1 - statistics.lower_bound / statistics.packs
    table.add_row("fill", f"{statistics.fill:.2%}, packs within {above:.2%} of the lower bound")
    if not data.plan.ended and steps * packing.packs_per_batch > statistics.packs:
        table.add_row("planned here", f"the first {statistics.packs:,} packs, of which all figures are")
    table.add_row("steps", f"{about}{steps:,} of {packing.packs_per_batch:,} packs")
    if statistics.ended_by is not None:
        early = f", before the {steps:,} steps asked for" if steps > ends else ""
        table.add_row("the data ends", f"after {ends:,} steps, with {statistics.ended_by}{early}")
    encoders, decoder = sampled_flops(recipe, data)
    total = (encoders + decoder) * steps
    table.add_row("training FLOPs", f"{total:.2e} ({encoders / (encoders + decoder):.1%} in encoders and adapters)")
    for name, peak in (("A100", 312e12), ("H100", 989e12)):
        table.add_row(f"on one {name} at 40 % MFU", spoken(total / (0.4 * peak)))
    for world in WORLDS:
        if all(len(batch) % world == 0 for batch in first_batches(data)):
            table.add_row(f"time lost to imbalance on {world} GPUs", f"{mean_imbalance(data, world) - 1:.1%}")
    return table


def spoken(seconds: float) -> str:
    """A time in the unit that people would say it in."""
    if seconds < 100:
        return f"{seconds:,.2g} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 6000 else f"{seconds / 3600:,.0f} hours"


def sampled_flops(recipe: Recipe, data: PlannedData) -> tuple[float, float]:
    """FLOPs of a training step in (encoders and adapters, decoder with head), from the first global batches."""
    model = data.blueprint.model
    freeze(model, recipe.optim)
    factors = training_factors(model.trained_parts())
    encoder_factor = max((factors[part] for part in factors if part.startswith("encoders")), default=0)
    costs = np.concatenate([data.plan.costs(batch) for batch in first_batches(data)])
    packs = recipe.packing.packs_per_batch
    encoders, decoder = costs.mean(axis=0) * packs
    if not isinstance(model, MultimodalLM):  # all that it costs is its pictures
        return encoders * encoder_factor, 0.0
    head = model.decoder.head_flops(1) * recipe.packing.capacity * packs  # at most: media slots bear no labels
    return encoders * encoder_factor, decoder * factors["decoder"] + head * factors["head"]


def mean_imbalance(data: PlannedData, world: int) -> float:
    """Step time relative to perfectly even ranks, mean over the first global batches."""
    ratios = []
    for batch in first_batches(data):
        costs = data.plan.costs(batch)
        ratios.append(imbalance(costs, deal(costs, world, seed=0)))
    return float(np.mean(ratios))


def first_batches(data: PlannedData) -> list[list[int]]:
    """Packs of the first global batches; of a part of one where no more is planned."""
    packs, size = data.plan.planned, data.plan.packs_per_batch
    total = -(-packs // size) if data.plan.ended else packs // size  # the last window may end within a batch
    return [data.plan.batch(step) for step in range(min(BATCHES, total))] or [list(range(packs))]
