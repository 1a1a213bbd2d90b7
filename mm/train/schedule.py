"""The learning rate over a run, as a factor of the optimizer's: a pure function of the step.

    cosine     half a cosine from the peak to the floor
    linear     a straight line from the peak to the floor
    wsd        the peak until the last part of the run, then down to the floor
    constant   the peak

All start with a linear warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from mm.bounds import Between, Share
from mm.configure import RecipeError

Kind = Literal["cosine", "linear", "wsd", "constant"]
DecayShape = Literal["linear", "1-sqrt"]

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Ways down from 1 to 0 as progress goes from 0 to 1."""


@dataclass
class ScheduleOptions:
    """`schedule:` of a recipe, see docs/optim.md. `floor`, `start` and `peak` are shares of the optimizer's rates.

    kind: what follows the warm-up; cosine as in Loshchilov and Hutter 2017, wsd (warm-up, stable, decay) as in Hu et
        al. 2024, section 4
    warmup: steps of linear warm-up; below 1 a share of the run
    decay: share of the run in which wsd comes down
    floor: where the run ends
    decay_shape: how wsd comes down: on a line, or as 1 − √progress (Hägele et al. 2024)
    start: where the warm-up begins, such as the floor of the run whose weights this one continues
    peak: where the warm-up ends; below 1 to warm a trained model up again by less (Ibrahim et al. 2024)
    """

    kind: Kind = "cosine"
    warmup: Annotated[float, Between(0, 1e9)] = 0.02
    decay: Share = 0.2
    floor: Share = 0.1
    decay_shape: DecayShape = "linear"
    start: Share = 0.0
    peak: Share = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("decay_shape", get_args(DecayShape))):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"schedule.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise RecipeError(f"schedule.warmup is {self.warmup}: give a share below 1 or a whole number of steps")
        for name in ("decay", "floor", "start", "peak"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"schedule.{name} is {value} and must be a share between 0 and 1")
        for name in ("start",) if self.kind == "constant" else ("start", "floor"):
            if getattr(self, name) > self.peak:
                raise RecipeError(
                    f"schedule.{name} is {getattr(self, name)} and must be at most schedule.peak, which is {self.peak}"
                )


def learning_rate_factor(options: ScheduleOptions, step: int, total: int) -> float:
    """Share of the optimizer's learning rates in a step.

    The warm-up of W steps goes 1/W, 2/W, …, 1 of the way from the start to the peak, so that no step is wasted on a
    rate of zero. The last step, total − 1, is at the floor (except for ``constant``, or if it is the peak itself), and
    so is whatever comes after.

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
        return options.start + (options.peak - options.start) * (step + 1) / warmup
    if options.kind == "constant":
        return options.peak
    last = total - 1
    progress = min(max((step - (last - falling)) / max(falling, 1), 0.0), 1.0)
    share = SHAPES[options.decay_shape if options.kind == "wsd" else options.kind](progress)
    return options.floor + (options.peak - options.floor) * share


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
