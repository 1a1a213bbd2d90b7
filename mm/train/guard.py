"""A guard against spikes of the loss: back to a good checkpoint, and past the batches after it.

    loss of a step ─far above the usual, `patience` steps in a row─▶ newest checkpoint from before
        ─▶ its position moves behind the last batch ─▶ the run goes on from there, as a resumed one does

The usual is the median of the last `window` losses that were not far above it; far are `threshold` robust standard
deviations. To go back some steps and pass over the batches since is what PaLM did by hand (Chowdhery et al. 2022,
section 5.1): the same batches did no harm from other weights, so it is the two together that spike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from torch import Tensor

from mm.bounds import Between, CountOrNone
from mm.configure import RecipeError
from mm.packing.batch import Batch
from mm.train.meter import JsonLines, lines_before

TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation: 1/Φ⁻¹(3/4)."""

LEAST_SPREAD = 0.01
"""Of the median. A loss that hardly varies is not spiking because it varies a little more."""


@dataclass(frozen=True)
class GuardOptions:
    """`guard:` of a recipe.

    window: how many losses tell what is usual; nothing is a spike before there are so many
    threshold: robust standard deviations above the usual from which a loss is high
    patience: high losses in a row that are a spike; also how many steps before them a checkpoint counts as good
    rewinds: how often a stage goes back at most; at the next spike the run stops
    """

    window: Annotated[int, Between(8, 2**20)] = 128
    threshold: Annotated[float, Between(0, 1e6, above=True)] = 6.0
    patience: Annotated[int, Between(1, 2**20)] = 3
    rewinds: CountOrNone = 3

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("patience", 1), ("rewinds", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"guard.{name} is {getattr(self, name)} and must be at least {least}")
        if self.threshold <= 0:
            raise RecipeError(f"guard.threshold is {self.threshold}; it is a number of standard deviations above 0")


@dataclass(frozen=True)
class Spike:
    """High losses in a row.

    step: of the last of them
    losses: one a step
    usual: the median of those before
    last_good: the last step after which the weights count as good
    rows: `Batch.rows` of this process in those steps, of those that it was there for
    """

    step: int
    losses: tuple[float, ...]
    usual: float
    last_good: int
    rows: tuple[Tensor, ...]

    def __str__(self) -> str:
        losses = ", ".join(f"{loss:.4g}" for loss in self.losses)
        return f"the loss spiked up to step {self.step}: {losses}, and {self.usual:.4g} is usual"


class Guard:
    """Judges the loss of every step. All processes give it the same losses and so agree.

    The losses stand in ``RUN/guard.jsonl``, so that a resumed run judges as one that was never broken. A stage is
    judged by its own losses: another mixture has another level.

    Args:
        done: the steps of the stage that are done.
        writes: whether this process keeps the file; one does.
    """

    def __init__(self, options: GuardOptions, folder: Path, done: range, *, writes: bool) -> None:
        self.options = options
        self._usual: deque[float] = deque(maxlen=options.window)
        self._high: list[float] = []
        self._rows: list[Tensor] = []
        path = folder / "guard.jsonl"
        for _, judged in lines_before(path, done.stop) if path.exists() else ():
            if judged["step"] in done:
                loss = judged["loss"]
                self._take(math.nan if loss is None else loss, judged["high"])
        self._lines = JsonLines(path, done.stop) if writes else None

    def judge(self, step: int, loss: float, batches: Sequence[Batch]) -> Spike | None:
        """The spike that is complete with this step, if one is. What follows is judged by what follows.

        Args:
            loss: of all processes together.
            batches: of this process.
        """
        is_high, usual = self._is_high(loss), self._usual
        if self._lines is not None:
            self._lines.write(step, {"loss": loss, "high": is_high})
        self._rows = [*self._rows, *(batch.rows for batch in batches)] if is_high else []
        spike = None
        if is_high and len(self._high) + 1 == self.options.patience:
            last_good = step - 2 * self.options.patience
            spike = Spike(step, (*self._high, loss), median(usual), last_good, tuple(self._rows))
        self._take(loss, is_high)
        return spike

    def _is_high(self, loss: float) -> bool:
        if len(self._usual) < self.options.window:
            return False
        usual = median(self._usual)
        deviation = TO_SIGMA * median(abs(other - usual) for other in self._usual)
        return not loss <= usual + self.options.threshold * max(deviation, LEAST_SPREAD * usual)  # nan is high

    def _take(self, loss: float, is_high: bool) -> None:
        if not is_high:
            self._high.clear()
            if math.isfinite(loss):
                self._usual.append(loss)
            return
        self._high.append(loss)
        if len(self._high) == self.options.patience:
            self._usual.clear()
            self._high.clear()
