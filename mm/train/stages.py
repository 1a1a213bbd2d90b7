"""The stages of a run: recipes that follow each other on one model, one optimizer and one line of steps.

    recipe of stage 0 ─▶ plan ──how far it read the sources──▶ recipe of stage 1 ─▶ plan-1-… ──▶ …

A stage that begins continues from the checkpoint at which the one before ended, as a resumed run does: weights, moments
of what trained before and still trains, counts of steps and tokens. Its plan is its own. A source that goes on starts
where the earlier plan had read to, at the end of a window, so that nothing is seen twice before its epoch ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mm.packing.windows import PlanReader, ReadTo
from mm.train.checkpoint import Finished, Position
from mm.train.dataset import PlannedData, open_data, open_sources, stage_folder
from mm.train.recipe import Recipe
from mm.train.sources import Blueprint


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage with its data.

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


def open_stages(recipe: Recipe, folder: Path, position: Position | None = None) -> Iterator[Stage]:
    """The stages of a recipe that are not over, and the last one even if it is, planned into `folder`.

    A stage is opened when it is asked for, since it begins where the one before has read to. Its sources are opened
    before the first one is given, so that a card or a filter that cannot be used is met before training begins.

    Args:
        position: of the newest checkpoint; None for a run that has none.

    Raises:
        RunError: a stage asks for more steps than its sources hold, or the run is beyond the end of its stage.
        PlanChanged: a stage was planned for other inputs.
    """
    recipes = recipe.stage_recipes()
    finished = position.finished if position is not None else ()
    if len(finished) >= len(recipes):
        raise RunError(
            f"the run has finished {len(finished)} stages and the recipe has {len(recipes)}; restore those that were "
            "taken out, or start a new run with init_from"
        )
    here = position
    if position is not None and len(finished) + 1 < len(recipes):
        begun, steps = _begin(finished), recipes[len(finished)].steps
        if steps is not None and position.step == begun + steps:
            # What this stage was planned for may have changed since: it is not opened again.
            finished, here = (*finished, Finished(position.step, position.packs)), None
    for later in recipes[len(finished) + 1 :]:
        open_sources(later, Blueprint.of(later), later.data.sources, lazy=later.data.lazy)
    for number in range(len(finished), len(recipes)):
        stage = _open(recipes[number], folder, number, finished, here)
        yield stage
        if number + 1 < len(recipes):
            packs, here = stage.packs_at(stage.end), None
            stage.data.plan.ensure(packs, progress=True)
            finished = (*finished, Finished(stage.end, packs))


def read_to(folder: Path, finished: tuple[Finished, ...]) -> dict[str, ReadTo]:
    """How far the plans of finished stages have read the sources.

    Raises:
        RunError: a plan is not there any more.
    """
    read: dict[str, ReadTo] = {}
    for number, stage in enumerate(finished):
        plan = stage_folder(_plan_folder(folder, number), read)
        if not (plan / "plan.json").exists():
            raise RunError(
                f"{plan} is not there: without it nobody knows what stage {number} has seen. Restore the folder, or "
                "start a new run with init_from"
            )
        read |= PlanReader(plan, 1).read_to(stage.packs)
    return read


def _begin(finished: tuple[Finished, ...]) -> int:
    """The step at which the stage after these begins."""
    return finished[-1].step if finished else 0


def _plan_folder(folder: Path, number: int, kind: str = "plan") -> Path:
    return folder / (f"{kind}-{number}" if number else kind)


def _open(
    recipe: Recipe, folder: Path, number: int, finished: tuple[Finished, ...], position: Position | None
) -> Stage:
    """A stage after some that have finished.

    Args:
        position: where the run stands in it; None at its beginning.
    """
    blueprint, begin = Blueprint.of(recipe), _begin(finished)
    data = open_data(
        recipe,
        blueprint,
        recipe.data.sources,
        _plan_folder(folder, number),
        epochs=recipe.epochs,
        start=read_to(folder, finished),
        lazy=recipe.data.lazy,
    )
    held_out = None
    if recipe.data.validation:
        validation = _plan_folder(folder, number, "validation")
        held_out = open_data(recipe, blueprint, recipe.data.validation, validation, epochs=1.0)
        held_out.plan.total_packs(progress=True)
    if position is None:
        position = Position(begin, 0, 0, data.plan.fingerprint, finished)
    end = _last_step(recipe, data, begin, position)
    if position.step > end:
        raise RunError(
            f"the run is at step {position.step}, beyond the end of stage {number} at step {end}; give the stage at "
            f"least {position.step - begin} steps, or start a new run with init_from"
        )
    return Stage(number, recipe, data, held_out, begin, end, position)


def _last_step(recipe: Recipe, data: PlannedData, begin: int, position: Position) -> int:
    """The step at which a stage ends. Where its sources end too, that means to plan them to their end.

    Sources without an end need no more than the packs of the first step; the others are planned while it trains. A
    batch size that changed on resume changes how many steps the rest of an epoch takes. Where the guard has passed over
    packs that the sources cannot make up for, the stage is as much shorter.

    Raises:
        RunError: the sources end before.
    """
    size, plan = recipe.packing.packs_per_batch, data.plan
    if recipe.steps is None:
        total = plan.total_packs(progress=True) or 0
        return position.step + -(-(total - position.packs) // size)
    end = begin + recipe.steps
    wanted = position.packs + max(end - position.step, 0) * size
    if plan.endless:
        plan.ensure(min(position.packs + size, wanted))
        return end
    enough = position.step + -(-(plan.ensure(wanted, progress=True) - position.packs) // size)
    if enough + position.passed_over // size < end:
        raise RunError(
            f"the recipe asks for {recipe.steps} steps and its sources hold enough for {enough - begin}; lower "
            "`steps`, or raise `epochs` of the sources"
        )
    return min(end, enough)
