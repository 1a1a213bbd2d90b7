"""The learning rate over a run, as a factor of its peak: a pure function of the step.

    cosine     half a cosine from the peak to the floor
    linear     a straight line from the peak to the floor
    wsd        the peak until the last part of the run, then a straight line to the floor
    constant   the peak

All start with a linear warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mm.configure import RecipeError

Kind = Literal["cosine", "linear", "wsd", "constant"]


@dataclass
class ScheduleOptions:
    """`schedule:` of a recipe.

    kind: what follows the warm-up; cosine as in Loshchilov and Hutter 2017, wsd (warm-up, stable, decay) as in Hu et
        al. 2024, section 4
    warmup: steps of linear warm-up; below 1 a share of the run
    decay: share of the run in which wsd comes down
    floor: where the run ends, as a share of the peak
    """

    kind: Kind = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "wsd", "constant"):
            raise RecipeError(f"schedule.kind is {self.kind!r}; allowed: cosine, linear, wsd, constant")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise RecipeError(f"schedule.warmup is {self.warmup}: give a share below 1 or a whole number of steps")
        for name in ("decay", "floor"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"schedule.{name} is {value} and must be a share between 0 and 1")


def learning_rate_factor(options: ScheduleOptions, step: int, total: int) -> float:
    """Share of the peak learning rate in a step.

    The warm-up of W steps gives 1/W, 2/W, …, 1, so that no step is wasted on a rate of zero. The last step, total − 1,
    is at the floor (except for ``constant``, or if it is the peak itself), and so is whatever comes after.

    Args:
        step: from 0.
        total: steps of the run.

    Raises:
        RecipeError: the run is too short for its warm-up and decay.
        ValueError: the step is negative.
    """
    if step < 0:
        raise ValueError(f"step {step} is before the start of the run")
    warmup = round(options.warmup * total) if options.warmup < 1 else int(options.warmup)
    falling = _falling_steps(options, total, warmup)
    if step < warmup:
        return (step + 1) / warmup
    if options.kind == "constant":
        return 1.0
    last = total - 1
    progress = min(max((step - (last - falling)) / max(falling, 1), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if options.kind == "cosine" else 1 - progress
    return options.floor + (1 - options.floor) * share


def _falling_steps(options: ScheduleOptions, total: int, warmup: int) -> int:
    """Number of steps, the last of the run, that are below the one before."""
    available = total - max(warmup, 1)  # the peak is one step, with or without warm-up
    falling = available if options.kind != "wsd" else round(options.decay * total)
    if available < 0 or falling > available:
        raise RecipeError(
            f"a run of {total} steps has no room for {warmup} steps of warm-up"
            + (f" and {falling} of decay" if options.kind == "wsd" else "")
            + "; lower schedule.warmup or schedule.decay"
        )
    return falling
