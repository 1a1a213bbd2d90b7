"""The stages of a run: recipes that follow each other on one model, one optimizer and one line of steps.

    recipe of stage 0 ─▶ plan ──positions of its sources──▶ recipe of stage 1 ─▶ plan-1-… ──▶ …

A stage that begins continues from the checkpoint at which the one before ended, as a resumed run does: weights, moments
of what trained before and still trains, counts of steps and tokens. Its plan is its own. A source that goes on starts
where the earlier plan had read to, at the end of a window, so that nothing is seen twice before its epoch ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mm.train.checkpoint import Cursors, Position
from mm.train.dataset import Blueprint, PlannedData, open_data
from mm.train.recipe import Recipe


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage with its data, planned to its end.

    begin, end: the steps of the run that it takes, ``range(begin, end)``
    position: where the run stands in it; at its beginning if it has not begun, and then without `tokens`
    """

    number: int
    recipe: Recipe
    data: PlannedData
    held_out: PlannedData | None
    begin: int
    end: int
    position: Position

    @property
    def is_over(self) -> bool:
        return self.position.step >= self.end

    def packs_at(self, step: int) -> int:
        """Packs of the stage's plan that are consumed when this step of the run is done."""
        return self.position.packs + (step - self.position.step) * self.recipe.packing.packs_per_batch

    def cursors(self, packs: int) -> Cursors:
        """Where a later stage's sources would start after so many packs of this one."""
        rows = {source.name: source.rows for source in self.data.plan.sources}
        here = {name: (cursor, rows[name]) for name, cursor in self.data.plan.cursors(packs).items()}
        return {**self.position.began, **here}


def open_stages(recipe: Recipe, folder: Path, position: Position | None = None) -> list[Stage]:
    """The stages of a recipe that are not over, and the last one even if it is, planned into `folder`.

    Args:
        position: of the newest checkpoint; None for a run that has none.

    Raises:
        RunError: a stage asks for more steps than its sources hold, or the run is beyond the end of its stage.
        PlanChanged: a stage was planned for other inputs.
    """
    recipes = recipe.stage_recipes()
    stages: list[Stage] = []
    start: Cursors = {}
    finished: tuple[int, ...] = ()
    for number, chosen in enumerate(recipes):
        begin = finished[-1] if finished else 0
        here = None
        if position is not None and number < len(position.finished):
            finished = (*finished, position.finished[number])
            continue
        if position is not None and number == len(position.finished):
            if chosen.steps is not None and position.step == begin + chosen.steps and number + 1 < len(recipes):
                finished, start = (*finished, position.step), position.sources
                continue  # what it was planned for may have changed since
            here, start = position, position.began
        stage = _open(chosen, folder, number, begin, here, start, finished)
        stages.append(stage)
        finished = (*finished, stage.end)
        start = stage.cursors(stage.packs_at(stage.end))
    if position is not None and len(position.finished) >= len(recipes):
        raise RunError(
            f"the run has finished {len(position.finished)} stages and the recipe has {len(recipes)}; restore those "
            "that were taken out, or start a new run with init_from"
        )
    return stages


def _open(
    recipe: Recipe,
    folder: Path,
    number: int,
    begin: int,
    position: Position | None,
    start: Cursors,
    finished: tuple[int, ...],
) -> Stage:
    suffix = f"-{number}" if number else ""
    blueprint = Blueprint.of(recipe)
    data = open_data(
        recipe, blueprint, recipe.data.sources, folder / f"plan{suffix}", epochs=recipe.epochs, start=start
    )
    held_out = None
    if recipe.data.validation:
        held_out = open_data(recipe, blueprint, recipe.data.validation, folder / f"validation{suffix}", epochs=1.0)
        held_out.plan.total_packs()
    if position is None:
        position = Position(begin, 0, 0, data.plan.fingerprint, finished, began=start)
    end = _planned_to_end(recipe, data, begin, position)
    if position.step > end:
        raise RunError(
            f"the run is at step {position.step}, beyond the end of stage {number} at step {end}; give the stage at "
            f"least {position.step - begin} steps, or start a new run with init_from"
        )
    return Stage(number, recipe, data, held_out, begin, end, position)


def _planned_to_end(recipe: Recipe, data: PlannedData, begin: int, position: Position) -> int:
    """Plan all packs that a stage needs from where it stands; returns the step at which it ends.

    A batch size that changed on resume changes how many steps the rest of an epoch takes.

    Raises:
        RunError: the sources end before.
    """
    size = recipe.packing.packs_per_batch
    if recipe.steps is None:
        total = data.plan.total_packs() or 0
        return position.step + -(-(total - position.packs) // size)
    end = begin + recipe.steps
    planned = data.plan.ensure(position.packs + max(end - position.step, 0) * size)
    enough = position.step + -(-(planned - position.packs) // size)
    if enough < end:
        raise RunError(
            f"the recipe asks for {recipe.steps} steps and its sources hold enough for {enough - begin}; lower "
            "`steps`, or raise `epochs` of the sources"
        )
    return end
